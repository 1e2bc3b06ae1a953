"""Figure 1 of the multi-source theory paper, the sweep over sim, from the files of run_gaussian.py."""

if not __package__:
    import _here

from simulations.plot_gaussian import paper_panel_command

main = paper_panel_command("sim")

if __name__ == "__main__":
    main()
