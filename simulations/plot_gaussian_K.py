"""Figure 1 of the multi-source theory paper, the sweep over K, from the files of run_gaussian.py."""

import sys
from pathlib import Path

if not __package__:  # run as a file: the packages are one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from simulations.plot_gaussian import paper_panel_command  # noqa: E402

main = paper_panel_command("K")

if __name__ == "__main__":
    main()
