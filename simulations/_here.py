"""Imported by a script that runs as a file: its packages are one folder up, installed or not."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
