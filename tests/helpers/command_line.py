"""main.py's command line in the process of the tests: what it says about wrong options, and modes that are short."""

import contextlib
import io
import sys
from unittest import mock

from absl import flags, logging
from absl.testing import flagsaver

from helpers.processes import ROOT


def run_here(*arguments, config="tests/helpers/tiny.py"):
    """`main.py --config=CONFIG arguments...` without a process of its own -> (exit code or message, stdout, stderr)."""
    sys.path.insert(0, str(ROOT))
    import main

    sys.path.remove(str(ROOT))
    argv = ["main.py", f"--config={config}", *arguments]
    out, err, code = io.StringIO(), io.StringIO(), 0
    handler, verbosity, saved = logging.get_absl_handler(), logging.get_verbosity(), flagsaver.save_flag_values()
    filters = list(handler.filters)
    try:
        # ml_collections reads sys.argv, for what the options of a config override
        with mock.patch.object(sys, "argv", argv), contextlib.chdir(ROOT):
            flags.FLAGS.unparse_flags()
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                main.parse_flags(argv)
                main.main(argv)
    except SystemExit as stop:
        code = stop.code
    finally:
        flagsaver.restore_flag_values(saved)
        handler.filters[:] = filters
        logging.set_verbosity(verbosity)
    return code, out.getvalue(), err.getvalue()


def refused_here(*arguments, **options):
    """The one line of a command that is refused: a message or exit code 1, nothing printed, no traceback."""
    code, out, err = run_here(*arguments, **options)
    lines = [code] if isinstance(code, str) else err.splitlines()
    assert out == "" and "Traceback" not in err and (isinstance(code, str) or code == 1), (code, out, err)
    assert lines[-1].startswith("error: ") and "\n" not in lines[-1], lines
    return lines[-1]
