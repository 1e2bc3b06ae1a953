"""Experiments about trained networks: solvers, robustness to disturbances, stable targets."""
