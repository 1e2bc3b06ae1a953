"""Figure of the autoregressive experiment from the files of run_arm.py."""

if not __package__:
    import _here

from simulations.sweeps import figure_command

main = figure_command("arm", ["K", "n", "D", "sim"])

if __name__ == "__main__":
    main()
