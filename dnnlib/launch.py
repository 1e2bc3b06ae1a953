"""torchrun that hands on the exit code 75 of its workers: `python -m dnnlib.launch OPTIONS SCRIPT ARGUMENTS`.

It ends with 75 where it was told to stop itself, too: it then tells its workers, and waits for their checkpoints.
"""

import sys

from dnnlib.cli import INTERRUPTED

PATIENCE = 300  # seconds that workers have for a checkpoint, unless --shutdown-timeout says otherwise
SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"


def main(argv: list[str] | None = None) -> None:
    """Run torchrun with these arguments. Raises SystemExit(75) as above."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        run.main([f"--shutdown-timeout={PATIENCE}", f"--signals-to-handle={SIGNALS}", *argv])
    except SignalException:
        sys.exit(INTERRUPTED)
    except ChildFailedError as err:
        if INTERRUPTED in {failure.exitcode for failure in err.failures.values()}:
            sys.exit(INTERRUPTED)
        raise


if __name__ == "__main__":
    main()
