"""Where things lie that tests read."""

from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent
GOLDEN = TESTS / "golden"  # recorded outputs of the public implementation
API_WORKFLOWS = TESTS / "workflows_api"
