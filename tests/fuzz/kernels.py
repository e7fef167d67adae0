from pathlib import Path
def fuzz(state: Path, cases: int, run: int) -> int:
    return 0
