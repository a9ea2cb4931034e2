"""Joint INR: its parts exactly, the whole on an image that it must be able to show."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from whorl.recon.inr import InrFit, fit_inr, principal_components, solve_head

SHAPE = (44, 37)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Products this small gain nothing from a second thread, and lose much where another program has it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


FITS = pytest.mark.parametrize("fit", ["varpro", "adam"])


def test_head_is_the_ridge_regression() -> None:
    generator = torch.Generator().manual_seed(4)
    features, target = (torch.randn((n, 200), generator=generator) for n in (7, 3))
    for ridge in (0.0, 0.5):
        head = solve_head(features, target, ridge)
        assert head.shape == (3, 7)
        gram = (features @ features.T).double()
        penalty = ridge * gram.diagonal().mean()
        stacked = torch.cat([features.T.double(), penalty.sqrt() * torch.eye(7, dtype=torch.float64)])
        right = torch.cat([target.T.double(), torch.zeros((7, 3), dtype=torch.float64)])
        expected = torch.linalg.lstsq(stacked, right).solution.T
        # Products in float32, condition below ten.
        torch.testing.assert_close(head.double(), expected, rtol=0, atol=1e-5)
    exact = solve_head(features, torch.ones((3, 7)) @ features, 0.0)
    torch.testing.assert_close(exact, torch.ones((3, 7)), rtol=0, atol=1e-5)


def object_(real: bool = False) -> tuple[Tensor, Tensor]:
    """Three joint images of two tissues and a smooth shading, off the centre, and their mask."""
    y, x = torch.arange(SHAPE[0])[:, None] - 24.0, torch.arange(SHAPE[1])[None, :] - 15.0
    mask = (y / 17) ** 2 + (x / 13) ** 2 < 1
    inner = ((y - 3) ** 2 + (x + 2) ** 2 < 36).float()
    shade = 1 + 0.01 * y - 0.008 * x
    images = torch.stack(
        [shade * (1 - 0.4 * inner), 0.3 * shade * (2 * inner - 1), 0.02 * shade * (0.5 - inner)]
    )
    return (images if real else images * torch.polar(torch.ones(SHAPE), 0.05 * y + 0.03 * x)), mask


def errors(fitted: Tensor, truth: Tensor, mask: Tensor) -> list[float]:
    """Relative error of each image within the mask."""
    difference = (fitted - truth)[:, mask].abs().square().sum(1)
    return (difference / truth[:, mask].abs().square().sum(1)).sqrt().tolist()


@FITS
@pytest.mark.parametrize("real", [False, True], ids=["complex", "real"])
def test_an_object_is_reproduced(fit: str, real: bool) -> None:
    truth, mask = object_(real)
    x0 = 1e3 * torch.where(mask, truth, 7)  # what lies outside does not count
    # Adam gets more steps; the learning rate is stated, not the default.
    result = fit_inr(x0, mask, fit=fit, iterations=100 if fit == "varpro" else 120, learning_rate=0.03)
    assert result.coefficients.shape == truth.shape
    assert result.coefficients.dtype == x0.dtype
    found = errors(result.coefficients, 1e3 * truth, mask)
    # Measured: 3, 8 and 8 % for varpro on the complex images, 1, 3 and 3 % on the real ones. Its head alone
    # follows the weakest image, 50 times smaller than the first, of which Adam has little by then.
    assert max(found) < 0.12 if fit == "varpro" else found[0] < 0.05 and found[1] < 0.2
    assert float(result.coefficients[:, ~mask].abs().max()) == 0
    assert result.losses[-1] < result.losses[0] / 10
    assert len(result.losses) == (101 if fit == "varpro" else 121)  # with that of the end


@FITS
def test_the_seed_decides(fit: str) -> None:
    x0, mask = object_()
    first, again, other = (
        fit_inr(x0, mask, fit=fit, iterations=8, seed=seed).coefficients for seed in (3, 3, 4)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@FITS
def test_a_scale_goes_through(fit: str) -> None:
    x0, mask = object_()
    one, large = (fit_inr(s * x0, mask, fit=fit, iterations=8).coefficients for s in (1.0, 4096.0))
    # A power of two changes no digit.
    assert torch.equal(one * 4096, large)


def test_weak_images_are_fitted_as_well_as_strong_ones() -> None:
    x0, mask = object_()
    weak = x0 * torch.tensor([1.0, 1.0, 2**-10]).reshape(3, 1, 1)
    a, b = (fit_inr(x, mask, iterations=10) for x in (x0, weak))
    # The third image hardly bends the features, but its head is solved all the same.
    assert errors(b.coefficients, weak, mask)[2] < 2 * errors(a.coefficients, x0, mask)[2] + 0.05


GRID = {"share": 0.5, "levels": 3, "features": 2, "base_resolution": 4, "finest_resolution": 20}
FITTED = {"hidden": 24, "learning_rate": 0.002, "lambda_enc": 1.0, "lambda_mlp": 1.0, "ridge": 0.5, "seed": 7}


@pytest.mark.parametrize(
    ("encoder", "name", "value"),
    [
        *(("grid", *item) for item in (GRID | FITTED | {"iterations": 4, "fit": "adam"}).items()),
        *(("hash", *item) for item in (GRID | {"log2_table": 4}).items()),
        *(("fourier", *item) for item in {"share": 0.5, "frequencies": 9, "sigma": 2.0}.items()),
        *(("siren", *item) for item in {"share": 0.5, "layers": 2, "omega": 5.0, "hidden": 24}.items()),
    ],
)
def test_every_parameter_is_used(encoder: str, name: str, value: Any) -> None:
    x0, mask = object_()
    plain: dict[str, Any] = {"encoder": encoder, "iterations": 3}
    first, again = (fit_inr(x0, mask, **plain).coefficients for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(fit_inr(x0, mask, **{**plain, name: value}).coefficients, first)


@pytest.mark.parametrize("encoder", ["grid", "hash", "fourier", "siren"])
def test_what_is_left_to_it_is_what_is_written(encoder: str) -> None:
    x0, mask = object_()
    told: dict[str, Any] = {
        "levels": 8, "hidden": 64, "finest_resolution": 96,
        "learning_rate": 0.001 if encoder == "siren" else 0.03,
    }  # fmt: skip
    plain = fit_inr(x0, mask, encoder=encoder, iterations=3).coefficients
    assert torch.equal(fit_inr(x0, mask, encoder=encoder, iterations=3, **told).coefficients, plain)


def test_iterations_that_are_left_to_it() -> None:
    x0, mask = (part[..., 20:30, 10:20] for part in object_())
    guide = x0.real.contiguous()
    for options, iterations in (({}, 100), ({"fit": "adam"}, 300), ({"guide": guide}, 0)):
        small: dict[str, Any] = {"hidden": 4, "levels": 2, **options}
        assert len(fit_inr(x0, mask, **small).losses) == iterations + 1


# --- With a guide -----------------------------------------------------------------------------------------


def guided(images: Tensor, mask: Tensor, **options: Any) -> InrFit:
    return fit_inr(images, mask, **{"guide": object_(real=True)[0], **options})


def real_noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("real", [False, True], ids=["complex", "real"])
@pytest.mark.parametrize("iterations", [0, 6])
def test_the_head_is_at_its_optimum_for_the_joint_features(iterations: int, real: bool) -> None:
    x0, mask = object_(real)
    x0 = x0 + 0.05 * (real_noise(*x0.shape) if real else torch.complex(*real_noise(2, *x0.shape)))
    found = guided(x0, mask, iterations=iterations, hidden=8)
    assert found.features.shape == (8 + 3 + 1, *SHAPE)  # of the MLP, the components of the guide, ones
    assert found.features.dtype == torch.float32
    assert torch.equal(found.features[-1], mask.float())
    assert float(found.features[:, ~mask].abs().max()) == 0
    assert found.coefficients.dtype == x0.dtype
    assert len(found.losses) == iterations + 1
    phi, parts = found.features[:, mask], x0 if real else torch.cat([x0.real, x0.imag])
    head = solve_head(phi, parts[:, mask], 1e-4)
    fitted = found.coefficients[:, mask]
    fitted = fitted if real else torch.cat([fitted.real, fitted.imag])
    # Float32 sums of 700 pixels whose features are far from independent.
    torch.testing.assert_close(fitted, head @ phi, rtol=0, atol=1e-4)
    scale = 0.5 * x0[0, mask].abs().max()
    error = (fitted - parts[:, mask]).square().sum() / int(mask.sum()) / scale**2
    assert found.losses[-1] == pytest.approx(float(error), rel=1e-3)


def test_the_features_begin_with_the_components_of_the_guide() -> None:
    x0, mask = object_()
    guide = object_(real=True)[0]
    found = guided(x0, mask)
    assert found.losses == (found.losses[0],)  # no iteration: only the head is solved
    # The levels of the grids add up to them: to rounding, for their finest has a point for each pixel.
    torch.testing.assert_close(found.features[-4:-1], principal_components(guide, mask), rtol=0, atol=1e-4)


@pytest.mark.parametrize("share", [1.0, 0.37, 0.05])
def test_the_finest_level_has_a_point_for_each_pixel_whatever_the_field_of_view(share: float) -> None:
    x0, mask = object_()
    found = guided(x0, mask, share=share)
    expected = principal_components(object_(real=True)[0], mask)
    torch.testing.assert_close(found.features[-4:-1], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("iterations", "least"), [(0, 0.02), (5, 0.05)])
def test_images_that_the_guide_spans_come_back_without_their_noise(iterations: int, least: float) -> None:
    guide, mask = object_(real=True)
    mixed = torch.tensor([[1.0, 0.5, 0.0], [-0.3, 1.0, 3.0], [0.1, 0.0, 2.0], [0.0, 0.0, 0.2]])
    truth = torch.einsum("jk,kyx->jyx", mixed, guide) + 0.3
    noisy = truth + 0.1 * real_noise(*truth.shape)
    found = guided(noisy, mask, iterations=iterations).coefficients
    assert float(found[:, ~mask].abs().max()) == 0
    error = (found - truth)[:, mask]
    # Some 20 features of 700 pixels have a 6th of the noise of 0.1; measured: 0.016 and 0.032. Iterations
    # follow the noise: the finest level has a point for each pixel.
    assert float(error.square().mean().sqrt()) < least
    assert errors(guided(truth, mask, iterations=iterations).coefficients, truth, mask)[0] < 0.005


def test_iterations_improve_what_the_guide_lacks() -> None:
    truth, mask = object_(real=True)
    x = torch.arange(SHAPE[1])[None, :]
    truth = truth + 0.2 * torch.sin(0.6 * x)  # none of it in the guide
    losses = guided(truth, mask, iterations=60).losses
    assert len(losses) == 61
    before = guided(truth, mask).losses[0]
    assert losses[-1] < before / 3


@pytest.mark.parametrize(
    ("name", "value"),
    # The number of features is that of the components of the guide.
    [
        *(item for item in (GRID | FITTED).items() if item[0] != "features"),
        ("iterations", 4),
        ("fit", "adam"),
        ("guide", None),
    ],
)
def test_every_parameter_is_used_with_a_guide(name: str, value: Any) -> None:
    x0, mask = object_()
    plain: dict[str, Any] = {"iterations": 3, "share": 0.9}
    first, again = (guided(x0, mask, **plain).coefficients for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(guided(x0, mask, **{**plain, name: value}).coefficients, first)


def test_what_is_left_to_it_with_a_guide_is_what_is_written() -> None:
    x0, mask = object_()
    told = {"levels": 4, "hidden": 16, "finest_resolution": SHAPE[0], "learning_rate": 0.003}
    plain = guided(x0, mask, iterations=3).coefficients
    assert torch.equal(guided(x0, mask, iterations=3, **told).coefficients, plain)


def test_a_complex_guide_counts_as_its_two_parts() -> None:
    x0, mask = object_()
    parts = torch.cat([x0.real, x0.imag])
    one, two = (guided(x0, mask, guide=guide) for guide in (x0, parts))
    assert torch.equal(one.coefficients, two.coefficients)
    assert one.features.shape[0] == 16 + 6 + 1


@pytest.mark.parametrize("fit", ["varpro", "adam"])
def test_scales_go_through_with_a_guide(fit: str) -> None:
    x0, mask = object_()
    guide, options = object_(real=True)[0], {"fit": fit, "iterations": 4}
    plain = guided(x0, mask, **options).coefficients
    assert torch.equal(guided(4096 * x0, mask, **options).coefficients, 4096 * plain)
    # The guide's own unit does not count.
    same = guided(x0, mask, guide=2.0**30 * guide, **options).coefficients
    torch.testing.assert_close(same, plain, rtol=0, atol=1e-4 * float(plain.abs().max()))


@pytest.mark.parametrize("iterations", [0, 3])
def test_a_guide_that_says_nothing_does_no_harm(iterations: int) -> None:
    x0, mask = object_()
    for guide in (torch.zeros((3, *SHAPE)), torch.ones((1, *SHAPE)), object_(real=True)[0][[0, 0, 0]]):
        found = guided(x0, mask, guide=guide, iterations=iterations)
        assert bool(torch.isfinite(torch.view_as_real(found.coefficients)).all())
        assert bool(torch.isfinite(found.features).all())


# --- Principal components ---------------------------------------------------------------------------------


def test_principal_components_are_uncorrelated_with_unit_variance() -> None:
    mask = object_()[1]
    mixing = torch.tensor([[5.0, 1.0, 0.0], [-2.0, 0.3, 0.1], [0.0, 0.2, -0.1], [1.0, 1.0, 1.0]])
    images = torch.einsum("jk,kyx->jyx", mixing, real_noise(3, *SHAPE)) + torch.tensor(
        [100.0, -3.0, 0.0, 1.0]
    ).reshape(4, 1, 1)
    found = principal_components(torch.where(mask, images, 1e4), mask)
    assert found.shape == images.shape
    assert found.dtype == images.dtype
    assert float(found[:, ~mask].abs().max()) == 0
    inside = found[:3, mask].double()
    # Float32 of the result; its sums are in double precision.
    torch.testing.assert_close(inside.mean(1), torch.zeros(3).double(), rtol=0, atol=1e-5)
    covariance = inside @ inside.T / inside.shape[1]
    torch.testing.assert_close(covariance, torch.eye(3).double(), rtol=0, atol=1e-4)
    # Three of four are independent: the last does not vary but for rounding.
    assert float(found[3].abs().max()) < 5


def test_principal_components_span_the_images_and_come_in_order() -> None:
    mask = object_()[1]
    strong, weak = (one.where(mask, 0) for one in real_noise(2, *SHAPE))
    strong, weak = (principal_components(one[None], mask)[0] for one in (strong, weak))
    images = torch.stack([0.1 * weak + 3 * strong, 0.1 * weak, 2 * strong])
    found = principal_components(images, mask)
    assert abs(float((found[0] * strong)[mask].mean())) == pytest.approx(1, abs=0.01)
    # Linear in the images: what they hold, and a constant, is all that is in there.
    columns = torch.cat([found[:2], torch.ones((1, *SHAPE))])[:, mask].double().T
    left = torch.linalg.lstsq(columns, images[:, mask].double().T).solution
    torch.testing.assert_close((columns @ left).T.float(), images[:, mask], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros((3, *SHAPE)),
        torch.full((2, *SHAPE), 7.0),
        real_noise(1, *SHAPE).repeat(3, 1, 1) * torch.tensor([1.0, 2.0, -4.0]).reshape(3, 1, 1),
        2.0**-100 * real_noise(2, *SHAPE),
    ],
    ids=["zero", "constant", "all alike", "tiny"],
)
def test_what_does_not_vary_stays_small(images: Tensor) -> None:
    mask = object_()[1]
    found = principal_components(images, mask)
    assert bool(torch.isfinite(found).all())
    flat = bool((images[:, mask] == images[:, mask][:, :1]).all())
    rank = 0 if flat else (2 if len(images) == 2 else 1)
    power = found[:, mask].square().mean(1)
    torch.testing.assert_close(power[:rank], torch.ones(rank), rtol=1e-4, atol=0)
    assert float(found[rank:].abs().sum()) < 1e-3


def test_one_pixel_has_no_components() -> None:
    mask = torch.zeros(SHAPE, dtype=torch.bool)
    mask[20, 10] = True
    assert float(principal_components(real_noise(3, *SHAPE), mask).abs().max()) == 0


# --- What is told and refused -----------------------------------------------------------------------------


@pytest.mark.parametrize("with_guide", [False, True], ids=["plain", "guided"])
def test_progress_is_told(with_guide: bool) -> None:
    x0, mask = object_()
    seen: list[tuple[int, int]] = []
    fit: Callable[..., InrFit] = guided if with_guide else fit_inr
    fit(x0, mask, iterations=3, progress=lambda *count: seen.append(count))
    assert seen == [(1, 3), (2, 3), (3, 3)]


@FITS
def test_what_progress_raises_ends_the_fit(fit: str) -> None:
    x0, mask = object_()
    seen = []

    def stop(done: int, of: int) -> None:
        seen.append(done)
        if done == 2:
            raise TimeoutError(f"iteration {done} of {of}")

    with pytest.raises(TimeoutError, match="iteration 2 of 5"):
        fit_inr(x0, mask, fit=fit, iterations=5, progress=stop)
    assert seen == [1, 2]


@FITS
@pytest.mark.parametrize("with_guide", [False, True], ids=["plain", "guided"])
def test_who_watches_sees_each_iteration_and_changes_none(fit: str, with_guide: bool) -> None:
    x0, mask = object_()
    one: Callable[..., InrFit] = guided if with_guide else fit_inr
    seen: list[tuple[int, InrFit]] = []
    watched = one(x0, mask, fit=fit, iterations=4, watch=lambda n, current: seen.append((n, current())))
    plain = one(x0, mask, fit=fit, iterations=4)
    assert torch.equal(watched.coefficients, plain.coefficients)
    assert watched.losses == plain.losses
    assert [n for n, _ in seen] == [1, 2, 3, 4]
    for n, current in seen:
        assert len(current.losses) == n + 1
        assert current.losses[:n] == plain.losses[:n]
    assert torch.equal(seen[-1][1].coefficients, plain.coefficients)
    assert torch.equal(seen[-1][1].features, plain.features)


def test_an_empty_mask_is_refused() -> None:
    x0, mask = object_()
    with pytest.raises(ValueError, match="mask is empty"):
        fit_inr(x0, torch.zeros_like(mask))


@FITS
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_no_numbers_are_refused(fit: str, value: float) -> None:
    x0, mask = object_()
    x0[1, 24, 15] = value
    for one in (fit_inr, guided):
        with pytest.raises(FloatingPointError, match="not finite"):
            one(x0, mask, fit=fit, iterations=2)
    # Outside they do not count.
    x0, mask = object_()
    x0[1, 0, 0] = value
    assert bool(torch.isfinite(fit_inr(x0, mask, fit=fit, iterations=2).coefficients.abs()).all())


def test_a_fit_that_diverges_is_refused() -> None:
    x0, mask = object_()
    with pytest.raises(FloatingPointError, match="diverged"):
        fit_inr(x0, mask, fit="adam", iterations=8, learning_rate=1e12)


@pytest.mark.parametrize(
    "pixels", [(slice(20, 21), slice(10, 11)), (slice(20, 21), slice(4, 30))], ids=["one", "row"]
)
def test_the_smallest_objects_do_not_fail(pixels: tuple[slice, slice]) -> None:
    x0 = object_()[0]
    mask = torch.zeros(SHAPE, dtype=torch.bool)
    mask[pixels] = True
    for one in (fit_inr, guided):
        for iterations in (0, 3):
            fitted = one(x0, mask, iterations=iterations).coefficients
            assert bool(torch.isfinite(torch.view_as_real(fitted)).all())
            assert float(fitted[:, ~mask].abs().max()) == 0


def test_an_object_without_signal_stays_without() -> None:
    x0, mask = object_()
    for one in (fit_inr, guided):
        assert float(one(0 * x0, mask, iterations=3).coefficients.abs().max()) == 0
