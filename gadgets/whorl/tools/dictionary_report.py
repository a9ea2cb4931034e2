"""What there is to say and to see about a dictionary."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from whorl.physics.dictionary import Dictionary, DictionaryParameters
from whorl.physics.epg import fisp_signal, n_orders
from whorl.physics.store import Entry, Store, file_name

#: Tissues at 3 T whose signals are drawn: name, T1 and T2 in ms.
_TISSUES = (
    ("white matter", 830.0, 60.0),
    ("grey matter", 1350.0, 85.0),
    ("fluid", 4000.0, 1500.0),
    ("fat", 260.0, 45.0),
)
_MIB = 1 << 20


def describe(parameters: DictionaryParameters, dictionary: Dictionary, store: Store | None) -> str:
    """Train, atoms, states, coefficients with their energies, and size, a line or a few each."""
    train, model, grid = parameters.train, parameters.model, dictionary.grid
    inversion = (
        "none"
        if train.inversion_time_ms is None
        else (f"{train.inversion_time_ms:g} ms, efficiency {model.inversion_efficiency:g}")
    )
    axes = []
    for name, axis, unit in zip(("T1", "T2", "B1"), grid.axes, (" ms", " ms", ""), strict=True):
        if len(axis) > 1:
            axes.append(f"{len(axis)} {name} from {axis[0]:g} to {axis[-1]:g}{unit}")
    states = ", ".join(
        f"{n_orders(train, t2)} for T2 = {t2:g} ms"
        for t2 in (float(grid.t2_axis_ms[0]), 80.0, float(grid.t2_axis_ms[-1]))
        if grid.t2_axis_ms[0] <= t2 <= grid.t2_axis_ms[-1]
    )
    lines = [
        f"train         {train.n_timepoints} timepoints from {train.source}; inversion: {inversion}",
        f"flip angles   {np.abs(train.flip_deg).min():g} to {np.abs(train.flip_deg).max():g}°, "
        f"TR {train.tr_ms.min():g} to {train.tr_ms.max():g} ms, "
        f"TE {train.te_ms.min():g} to {train.te_ms.max():g} ms",
        f"slice         {len(model.profile)} place{'s' if len(model.profile) > 1 else ''} across, "
        f"diffusion {f'{model.diffusion_per_ms:.3g} per ms' if model.diffusion_per_ms else 'none'}",
        f"atoms         {len(grid)}: {', '.join(axes)}; T2 <= T1",
        f"states        {states}",
        f"coefficients  {dictionary.basis.shape[1]}, "
        f"{'complex' if dictionary.basis.is_complex() else 'real'}, "
        f"which keep {dictionary.energy:.6%} of the energy",
    ]
    before = 0.0
    for k, kept in enumerate(dictionary.kept, start=1):
        lines.append(f"  {k:2d}          {kept - before:11.6%}  together {kept:.6%}")
        before = kept
    tensors = (dictionary.coefficients, dictionary.basis)
    lines.append(
        f"size          {sum(t.numel() * t.element_size() for t in tensors) / _MIB:.2f} MiB in memory"
    )
    if store is None:
        lines.append("cache         off (cache_mb=0)")
    else:
        path = store.folder / file_name(parameters)
        size = f"{path.stat().st_size / _MIB:.2f} MiB in {path}" if path.exists() else ""
        lines.append(f"cache         {size or f'not in {store.folder}'}")
    return "\n".join(lines)


def describe_entries(entries: list[Entry], folder: Path) -> str:
    """The dictionaries that a cache holds, one line each."""
    if not entries:
        return f"no dictionaries in {folder}"
    lines = [f"{len(entries)} in {folder}, {sum(e.n_bytes for e in entries) / _MIB:.1f} MiB:"]
    for entry in entries:
        about = entry.about
        what = (
            f"cannot be read: {about['error']}"
            if "error" in about
            else (
                f"{about.get('timepoints')} timepoints from {about.get('train')}, "
                f"{about.get('atoms')} atoms, K = {about.get('coefficients')}"
            )
        )
        lines.append(f"  {entry.path.name}  {entry.n_bytes / _MIB:7.2f} MiB  {what}")
    return "\n".join(lines)


def draw(parameters: DictionaryParameters, dictionary: Dictionary, path: Path) -> None:
    """Train, signals of some tissues and basis, as a picture.

    Raises
    ------
    ImportError
        If matplotlib is not installed.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    train = parameters.train
    _, t1_ms, t2_ms = zip(*_TISSUES, strict=True)
    simulated = fisp_signal(train, torch.tensor(t1_ms), torch.tensor(t2_ms), model=parameters.model)
    projected = simulated @ dictionary.basis.conj() @ dictionary.basis.T
    figure, (top, middle, bottom) = plt.subplots(3, 1, figsize=(11, 9), sharex=True, layout="constrained")
    top.plot(train.flip_deg, color="black", linewidth=1)
    top.set_ylabel("flip angle (°)")
    times = top.twinx()
    times.plot(train.tr_ms, color="tab:red", linewidth=1)
    times.set_ylabel("TR (ms)", color="tab:red")
    times.set_ylim(0, 1.2 * train.tr_ms.max())
    for (name, t1, t2), signal, kept in zip(_TISSUES, simulated.real, projected.real, strict=True):
        (line,) = middle.plot(signal, linewidth=1, label=f"{name}, {t1:g} / {t2:g} ms")
        middle.plot(kept, linestyle=":", linewidth=2, color=line.get_color())
    middle.set_ylabel("signal (M0 = 1); dotted: in the subspace")
    middle.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize="small")
    for k, column in enumerate(dictionary.basis.real.T.numpy(), start=1):
        bottom.plot(column, linewidth=1, label=str(k))
    bottom.set_ylabel("basis")
    bottom.set_xlabel("timepoint")
    bottom.legend(title="coefficient", loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize="small")
    figure.savefig(path, dpi=110)
    plt.close(figure)
