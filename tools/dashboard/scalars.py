"""What a recorder measures, as TensorBoard scalars, with charts that lie together under "Custom Scalars".

    writer = SummaryWriter(run)
    scalars = RoutingScalars(writer)
    ...
    recorder.step(step, loss=loss)
    scalars.write(recorder)                          # after each step or less often; each window is written once

The cheap tier: it needs no plugin and shows in any TensorBoard. It writes ``recorder.summary()`` and six measures a
layer, however many experts there are; what is an expert's is in the recorder's log and the tab "Routing".
"""

from __future__ import annotations

import math
import re
from typing import Protocol

from ...moe.record import Recorder, measures

# measure of moe.record.measures: its title
LAYER_MEASURES = {
    "entropy": "collapse-aware entropy",
    "max_violation": "MaxVio",
    "dead": "dead experts",
    "dropped": "dropped assignments",
    "information": "routing information",
    "balance": "balance (1 = even)",
}
_GROUPS = {
    "collapse-aware entropy: mean, least": ("entropy", "entropy_least"),
    "MaxVio: mean, most": ("max_violation", "max_violation_most"),
    "dead experts: mean, most": ("dead", "dead_most"),
    "dropped assignments: mean, most": ("dropped", "dropped_most"),
    "routing information: mean, least; token entropy": ("information", "information_least", "token_entropy"),
    "balance (1 = even)": ("balance",),
    "load that moved since the window before": ("load_drift",),
    "top-k mass; tokens near a flip": ("top_k_mass", "margin_below_0.1"),
    "largest logits (rms)": ("logit_rms_most",),
}


class Writer(Protocol):
    """``torch.utils.tensorboard.SummaryWriter``, or what does the same."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None: ...

    def add_custom_scalars(self, layout: dict) -> None: ...


def layout() -> dict[str, dict[str, list]]:
    """What ``add_custom_scalars`` takes, to be joined with charts of one's own: a writer keeps one layout."""
    # TensorBoard takes tags for regular expressions that a tag begins with.
    return {
        "routing": {
            title: ["Multiline", [f"{re.escape(f'routing/{name}')}$" for name in names]]
            for title, names in _GROUPS.items()
        },
        "routing, layer by layer": {
            title: ["Multiline", [rf"routing/layer_\d+/{name}$"]] for name, title in LAYER_MEASURES.items()
        },
    }


class RoutingScalars:
    """
    Args:
        writer: of the first rank; gets the layout at once.
    """

    def __init__(self, writer: Writer) -> None:
        self.writer = writer
        self._written: int | None = None
        writer.add_custom_scalars(layout())

    def write(self, recorder: Recorder) -> None:
        """Writes the recorder's last window at its last step, if that has not been written. Waits for a window that is
        on its way. Leaves out what is not known: scores of a router that gives none."""
        summary, window = recorder.summary(), recorder.window
        if window is None or window.last == self._written:
            return
        self._written = window.last
        per_layer = measures(window, recorder.layers)
        values = summary | {
            f"routing/layer_{place:02d}/{name}": float(value)
            for name in LAYER_MEASURES
            for place, value in enumerate(per_layer[name])
        }
        for name, value in values.items():
            if not math.isnan(value):
                self.writer.add_scalar(name, value, window.last)
