"""The blocks of text that the algorithm files share. After a change in one, copy its blocks into the files beside it:

python tests/shared.py copy algos/ppo.py
"""

import re
import sys
from pathlib import Path

BLOCKS = {
    "arguments": r"    env_id: .*?(?=^\n\n# ==== )",
    "networks": r"# ==== shared: networks\n.*?(?=^# ==== )",
    "advantages": r"def compute_gae.*?(?=^\n\ndef )",
    "collect": r"            # 1\. Collect T steps .*?ended = [^\n]*\n",
    "transfer": r"# ==== shared: transfer.*?(?=^# ==== )",
    "plumbing": r"# ==== shared: plumbing.*\Z",
}
OWN_LINE = r'    env_id: str = "[^\n]*\n'  # in the arguments: each file keeps its default


def find_block(name, source):
    """The text of a block, or None if the file does not have it."""
    match = re.search("^" + BLOCKS[name], source, re.MULTILINE | re.DOTALL)
    return match and match[0]


def with_blocks(target, source):
    """The text `target` with the blocks of the text `source` instead of those that it has."""
    for name in BLOCKS:
        old, new = find_block(name, target), find_block(name, source)
        if old and new:
            if own_line := re.search(OWN_LINE, old):
                new = re.sub(OWN_LINE, lambda _, line=own_line[0]: line, new)
            target = target.replace(old, new)
    return target


if __name__ == "__main__":
    if sys.argv[1:2] != ["copy"] or len(sys.argv) != 3:
        sys.exit(__doc__)
    for path in Path(sys.argv[2]).parent.glob("*.py"):
        path.write_text(with_blocks(path.read_text(), Path(sys.argv[2]).read_text()))
