"""The EDM-era networks: DDPM++, NCSN++ and ADM U-Nets with EDM, VP, VE or iDDPM preconditioning."""

from training.networks_edm.precond import EDMPrecond, VEPrecond, VPPrecond, iDDPMPrecond
from training.networks_edm.unets import DhariwalUNet, SongUNet

__all__ = ["DhariwalUNet", "EDMPrecond", "SongUNet", "VEPrecond", "VPPrecond", "iDDPMPrecond"]
