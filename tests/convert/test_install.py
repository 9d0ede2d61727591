"""An installation of the runtime alone, without what conversion needs."""

import subprocess
import sys
from pathlib import Path


def test_a_missing_library_is_named_with_the_command_that_installs_it(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        f"from billm_convert.cli import main; sys.exit(main([{str(tmp_path)!r}, {str(tmp_path / 'out.billm')!r}]))"
    )
    environment = {"PYTHONPATH": ":".join(path for path in sys.path if path)}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert run.returncode == 2
    assert run.stderr.strip().count("\n") == 0
    assert "torch is not installed" in run.stderr and "billm-rt[convert]" in run.stderr
