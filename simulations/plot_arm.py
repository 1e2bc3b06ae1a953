"""Figure of the autoregressive experiment from the files of run_arm.py."""

import sys
from pathlib import Path

if not __package__:  # run as a file: the packages are one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from simulations.sweep_command import figure_command  # noqa: E402

main = figure_command("arm", ["K", "n", "D", "sim"])

if __name__ == "__main__":
    main()
