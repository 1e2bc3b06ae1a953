"""Theory experiments (Gaussian, autoregressive, energy-based) and 2-D diffusion experiments."""
