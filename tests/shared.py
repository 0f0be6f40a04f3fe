"""The blocks of text that the algorithm files share: check that they are equal, or copy them from one file.

python tests/shared.py                      # says which blocks differ from those of algos/ppo.py
python tests/shared.py copy algos/ppo.py    # after a change in ppo.py: copies its blocks into the files beside it
"""

import re
import sys
from pathlib import Path

ALGOS = Path(__file__).resolve().parent.parent / "algos"
BLOCKS = {
    "arguments": r"    env_id: .*?(?=^\n\n# ==== )",
    "networks": r"# ==== shared: networks\n.*?(?=^# ==== )",
    "advantages": r"def compute_gae.*?(?=^\n\ndef )",
    "collect": r"            # 1\. Collect T steps .*?(?=^            # 2\. )",
    "plumbing": r"# ==== shared: plumbing.*\Z",
}
OWN_LINE = r'    env_id: str = "[^\n]*\n'  # in the arguments: each file keeps its default


def find_block(name, source):
    """The text of a block, or None if the file does not have it."""
    match = re.search("^" + BLOCKS[name], source, re.MULTILINE | re.DOTALL)
    return match and match[0]


def differences(path):
    """For each file beside `path`: the names of its blocks that differ, and its text with those of `path` instead."""
    for other in sorted(path.parent.glob("*.py")):
        text, names = other.read_text(), []
        for name in BLOCKS:
            wanted, found = find_block(name, path.read_text()), find_block(name, text)
            if wanted and found:
                if own_line := re.search(OWN_LINE, found):
                    wanted = re.sub(OWN_LINE, lambda _, line=own_line[0]: line, wanted)
                names += [name] * (wanted != found)
                text = text.replace(found, wanted)
        if names:
            yield other, names, text


if __name__ == "__main__":
    copy = sys.argv[1:2] == ["copy"] and len(sys.argv) == 3
    if sys.argv[1:] and not copy:
        sys.exit(__doc__)
    found = list(differences(Path(sys.argv[2]) if copy else ALGOS / "ppo.py"))
    for path, names, text in found:
        print(f"{path}: {', '.join(names)}", "copied" if copy else "not the same")
        if copy:
            path.write_text(text)
    sys.exit(1 if found and not copy else 0)
