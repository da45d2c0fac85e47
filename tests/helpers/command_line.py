"""main.py's command line in the process of the tests: what it says about wrong options, and modes that are short."""

import contextlib
import importlib.util
import io
import sys
from unittest import mock

from absl import flags, logging

from helpers.processes import ROOT


@contextlib.contextmanager
def flags_of_main():
    """absl's flags without those of benchmarks that tests have imported, whose names main.py has too; as they were
    afterwards, so that main.py is to be imported anew within."""
    state = flags.FLAGS.__dict__
    before = dict(state)
    state.update({key: dict(value) for key, value in before.items() if isinstance(value, dict)})
    for module, own in flags.FLAGS.flags_by_module_dict().items():
        if module.startswith("benchmarks"):
            for flag in own:
                state["__flags"].pop(flag.name, None)
    try:
        yield
    finally:
        state.clear()
        state.update(before)


def run_here(*arguments, config="tests/helpers/tiny.py"):
    """`main.py --config=CONFIG arguments...` without a process of its own -> (exit code or message, stdout, stderr)."""
    argv = ["main.py", f"--config={config}", *arguments]
    out, err, code = io.StringIO(), io.StringIO(), 0
    handler, logger, verbosity = logging.get_absl_handler(), logging.get_absl_logger(), logging.get_verbosity()
    level = logger.level
    filters = list(handler.filters)
    try:
        # ml_collections reads sys.argv, for what the options of a config override
        with flags_of_main(), mock.patch.object(sys, "argv", argv), contextlib.chdir(ROOT):
            spec = importlib.util.spec_from_file_location("main", ROOT / "main.py")
            main = importlib.util.module_from_spec(spec)
            with mock.patch.dict(sys.modules, {"main": main}):  # where absl finds whose flags they are
                spec.loader.exec_module(main)
            flags.FLAGS.unparse_flags()
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                main.parse_flags(argv)
                main.main(argv)
    except SystemExit as stop:
        code = stop.code
    finally:
        handler.filters[:] = filters
        logging.set_verbosity(verbosity)
        logger.setLevel(level)  # set_verbosity() sets one where there was none
    return code, out.getvalue(), err.getvalue()


def refused_here(*arguments, **options):
    """The one line of a command that is refused: a message or exit code 1, nothing printed, no traceback."""
    code, out, err = run_here(*arguments, **options)
    lines = [code] if isinstance(code, str) else err.splitlines()
    assert out == "" and "Traceback" not in err and (isinstance(code, str) or code == 1), (code, out, err)
    assert lines[-1].startswith("error: ") and "\n" not in lines[-1], lines
    return lines[-1]
