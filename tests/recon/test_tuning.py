"""Choice of a preset: which are tried, and which is taken."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from whorl.kspace.nufft import make_nufft
from whorl.pipeline.deadlines import DeadlinePassed
from whorl.recon.corrected import Start
from whorl.recon.inr import InrFit
from whorl.recon.normal import GramNormal
from whorl.recon.slicedata import SliceData
from whorl.recon.tuning import PRESETS, Preset, choose, worth_trying

SHAPE = (5, 4)


def test_presets_become_finer() -> None:
    presets = list(PRESETS.values())
    assert [p.finest for p in presets] == sorted(p.finest for p in presets)
    assert [p.steps for p in presets] == sorted(p.steps for p in presets)


@pytest.mark.parametrize(
    ("error", "at_a_time", "names"),
    [
        (0.5, 2, ("high_noise", "normal")),
        (0.1001, 2, ("high_noise", "normal")),
        (0.1, 2, ("normal", "low_noise")),
        (1e-4, 1, ("normal",)),
        (0.5, 3, ("high_noise", "normal", "low_noise")),
        (1e-4, 16, ("high_noise", "normal", "low_noise")),
    ],
)
def test_noise_decides_what_is_worth_trying(error: float, at_a_time: int, names: tuple[str, ...]) -> None:
    assert worth_trying(error, at_a_time) == names


def start(angle: float) -> Start:
    """With a phase and coil maps by which it is known again."""
    phase = torch.polar(torch.ones(SHAPE), torch.full(SHAPE, angle))
    ones = torch.ones((1, *SHAPE), dtype=torch.complex64)
    nufft = make_nufft(torch.zeros((1, 2)), SHAPE)
    normal = GramNormal(torch.ones((1, 1, 1), dtype=torch.complex64), torch.ones((1, 1)), ones * angle, nufft)
    data = SliceData(ones[None], normal, ones, torch.ones(SHAPE, dtype=torch.bool), torch.ones(1))
    return Start(data, torch.ones((1, *SHAPE)), phase)


@pytest.mark.parametrize(
    ("errors", "taken"),
    [
        ((0.2, 0.1, 0.05), "fine"),
        ((0.1004, 0.2, 0.1), "coarse"),  # within half a per cent of the best
        ((0.1006, 0.2, 0.1), "fine"),
        ((0.1006, 0.1004, 0.1), "middle"),
        ((0.1, 0.0996, 0.0992), "middle"),  # of the smallest, not of the next
        ((0.1, 0.1, 0.1), "coarse"),
        ((0.05, 0.1, 0.2), "coarse"),
        ((0.0, 0.0, 0.0), "coarse"),
        ((0.1, 0.0, 1.0), "middle"),
    ],
)
def test_the_coarsest_that_is_as_good_as_the_best(errors: tuple[float, ...], taken: str) -> None:
    presets = {"coarse": Preset(4, 10, 1), "middle": Preset(8, 20, 1), "fine": Preset(8, 30, 1)}
    starts = {4: start(0.3), 8: start(0.8)}

    def fit(begin: Start, name: str) -> InrFit:
        preset = presets[name]
        assert begin is starts[preset.steps]
        values = torch.full((1, *SHAPE), float(preset.finest))
        return InrFit(values, (0.0,), torch.ones((1, *SHAPE)))

    def error(images: Tensor, csm: Tensor) -> float:
        angle = float(csm[0, 0, 0].real)
        finest = round(float(images[0, 0, 0].abs()))
        # Images with the phase and the maps of the start that was fitted.
        assert angle == pytest.approx(0.3 if finest == 10 else 0.8)
        assert float(images[0, 0, 0].angle()) == pytest.approx(angle)
        return errors[(10, 20, 30).index(finest)]

    one, tried = choose({name: preset.steps for name, preset in presets.items()}, starts, fit, error)
    assert one.name == taken
    assert [(t.name, t.error) for t in tried] == list(zip(presets, errors, strict=True))
    assert one.start is starts[presets[taken].steps]
    assert float(one.fit.coefficients.max()) == presets[taken].finest


def test_a_single_preset_is_taken() -> None:
    one, tried = choose(
        {"normal": 8},
        {8: start(0.2)},
        lambda begin, _: InrFit(begin.z, (0.0,), begin.z),
        lambda *_: 3.0,
    )
    assert (one.name, len(tried)) == ("normal", 1)


@pytest.mark.parametrize("late", [("fine",), ("coarse",), ("coarse", "fine")])
def test_what_is_late_is_left_out(late: tuple[str, ...]) -> None:
    def fit(begin: Start, name: str) -> InrFit:
        if name in late:
            raise DeadlinePassed("late")
        return InrFit(begin.z, (0.0,), begin.z)

    names = {"coarse": 8, "fine": 8}
    if len(late) == 2:
        with pytest.raises(DeadlinePassed):
            choose(names, {8: start(0.2)}, fit, lambda *_: 3.0)
        return
    one, tried = choose(names, {8: start(0.2)}, fit, lambda *_: 3.0)
    assert [t.name for t in tried] == [one.name] == [name for name in names if name not in late]
