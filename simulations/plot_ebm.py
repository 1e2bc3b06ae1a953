"""Figure of the energy-based experiment from the files of run_ebm.py."""

if not __package__:
    import _here

from simulations.sweeps import figure_command

main = figure_command("ebm", ["K", "n", "sim"])

if __name__ == "__main__":
    main()
