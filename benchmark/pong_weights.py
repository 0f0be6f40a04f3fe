"""What the first layer of a policy looks for on the court of envs/pong.py, before and after training.

    python benchmark/pong_weights.py runs/…/checkpoint.pt        # of any policy gradient

draws benchmark/pong-weights.png. Each picture is a hidden unit: the weight of each pixel of the difference of two
frames, red where an arrival raises the unit's activity and a departure lowers it, blue where it is the other way round.
On each side are the units with the largest weights (by their norm), the largest first; the colours span the same range
in all pictures of a side.
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from gymnasium import spaces

sys.path.insert(0, str(Path(__file__).parents[1] / "algos"))
import reinforce

ROWS, COLUMNS = 3, 4  # of pictures on each side
SPACE = spaces.Box(-1, 1, (80 * 80,), np.int8)


def first_weights(checkpoint: dict) -> tuple[np.ndarray, np.ndarray]:
    """The weights of the actor's first layer before and after training, each (units, 80, 80)."""
    args = checkpoint["args"]
    torch.manual_seed(args["seed"])  # as train does before it makes the agent
    known = {name: value for name, value in args.items() if name in reinforce.Args.__annotations__}
    before = reinforce.Agent(SPACE, spaces.Discrete(2), reinforce.Args(**known)).actor[0].weight
    after = checkpoint["agent"].get("actor.0.weight")
    if after is None or after.shape[1] != 80 * 80:
        sys.exit("error: this is not a policy gradient's checkpoint of envs/pong.py")
    return tuple(weight.numpy(force=True).reshape(-1, 80, 80) for weight in (before, after))


def draw(figure: plt.Figure, weights: np.ndarray, title: str) -> None:
    """The units with the largest weights, (units, 80, 80), in a grid."""
    norms = np.linalg.norm(weights, axis=(1, 2))
    largest = weights[np.argsort(-norms)[: ROWS * COLUMNS]]
    limit = np.percentile(np.abs(largest), 99.8)  # a few single pixels may be beyond it
    figure.suptitle(title)
    for axes, weight in zip(figure.subplots(ROWS, COLUMNS).flat, largest, strict=False):  # some have fewer units
        image = axes.imshow(weight, cmap="RdBu_r", vmin=-limit, vmax=limit)
        axes.set(xticks=[], yticks=[])
    figure.colorbar(image, ax=figure.axes, shrink=0.6, label="weight")


def main(path: Path, picture: Path) -> None:
    before, after = first_weights(torch.load(path, map_location="cpu", weights_only=True))
    figure = plt.figure(figsize=(12, 4.3), layout="constrained")
    left, right = figure.subfigures(1, 2)
    draw(left, before, "before training")
    draw(right, after, "after training")
    figure.savefig(picture, dpi=100)
    plt.close(figure)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(__file__).with_name("pong-weights.png"))
