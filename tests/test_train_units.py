"""The parts of train_rqvae.py against references: brute force, numpy, scikit-learn and float64 formulas."""

import itertools
import json
import math
from collections import Counter

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist
from sklearn.cluster import KMeans
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import train_rqvae
from train_rqvae import RQVAE, EMAVectorQuantizer, RQVAEConfig, VectorQuantizer

DIM, LATENT, SIZE, LEVELS = 24, 8, 8, 3
QUANTIZERS = [
    pytest.param({"use_rotation_trick": rotation, "use_ema_vq": ema}, id=f"{way}-{kind}")
    for rotation, way in ((False, "straight"), (True, "rotation"))
    for ema, kind in ((False, "gradient"), (True, "ema"))
]


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def tiny_config(**changes) -> RQVAEConfig:
    tiny = {
        "item_embedding_dim": DIM,
        "encoder_hidden_dims": [32, 16],
        "codebook_embedding_dim": LATENT,
        "codebook_quantization_levels": LEVELS,
        "codebook_size": SIZE,
        "batch_size": 64,
        "max_steps": 20,
    }
    return RQVAEConfig(**tiny | changes)


def clusters(n: int = 300, dim: int = DIM, seed: int = 0) -> Tensor:
    generator = np.random.default_rng(seed)
    x = generator.normal(size=(10, dim))[generator.integers(10, size=n)] + 0.3 * generator.normal(size=(n, dim))
    return torch.from_numpy(x / np.linalg.norm(x, axis=1, keepdims=True)).float()


def started_model(x: Tensor, **changes) -> RQVAE:
    """A model whose codebooks come from k-means, as in training."""
    model = RQVAE(tiny_config(**changes))
    train_rqvae.fit_standardisation(model, x)
    train_rqvae.start_quantizing(model, x, [torch.optim.Adam(model.parameters())], rows_per_step=64, seed=0)
    for quantizer in model.quantizers:  # what k-means counted is not what these tests are about
        if isinstance(quantizer, EMAVectorQuantizer):
            quantizer.step_sums.zero_()
    return model


def reconstruction_loss(difference) -> float:
    """Of standardised embeddings and their reconstruction (B, D), in float64."""
    errors, scale = (np.asarray(difference, dtype=np.float64) ** 2).mean(1), train_rqvae.ERROR_SCALE
    return float(train_rqvae.RECONSTRUCTION_WEIGHT * scale * np.log(1 + errors / scale).mean())


def tensors_of(model: RQVAE) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


# ---------------------------------------------------------------- nearest codes and the two estimators


@pytest.mark.parametrize(("n", "size", "dim"), [(200, 16, 8), (1, 2, 1), (50, 256, 32), (64, 3, 5)])
def test_nearest_codes_are_those_of_brute_force(n, size, dim):
    x, codebook = torch.randn(n, dim, dtype=torch.float64), torch.randn(size, dim, dtype=torch.float64)
    assert np.array_equal(train_rqvae.nearest_codes(x, codebook), cdist(x, codebook).argmin(1))


def test_nearest_codes_in_float32_are_as_near_as_any():
    x, codebook = torch.randn(500, 32), torch.randn(256, 32)
    distances = cdist(x.double(), codebook.double())
    found = distances[np.arange(500), train_rqvae.nearest_codes(x, codebook)]
    assert np.allclose(found, distances.min(1), rtol=1e-5)


def rotation_of(x: Tensor, code: Tensor) -> tuple[Tensor, Tensor]:
    """lambda and R of equation 4, arXiv:2410.06424, for one row, as an explicit matrix."""
    e, q = x / x.norm(), code / code.norm()
    r = (e + q) / (e + q).norm()
    return code.norm() / x.norm(), torch.eye(len(x), dtype=x.dtype) - 2 * torch.outer(r, r) + 2 * torch.outer(q, e)


def test_rotation_has_the_gradient_of_the_papers_matrix():
    x = torch.randn(40, LATENT, dtype=torch.float64, requires_grad=True)
    code, weight = torch.randn(40, LATENT, dtype=torch.float64), torch.randn(40, LATENT, dtype=torch.float64)
    (train_rqvae.rotate_to(x, code) * weight).sum().backward()
    for row in range(len(x)):
        scale, rotation = rotation_of(x[row].detach(), code[row])
        e, q = x[row].detach() / x[row].detach().norm(), code[row] / code[row].norm()
        assert torch.allclose(rotation @ e, q, atol=1e-12)  # the reference itself: a rotation, of e onto q
        assert torch.allclose(rotation.T @ rotation, torch.eye(LATENT, dtype=torch.float64), atol=1e-12)
        assert torch.allclose(x.grad[row], scale * rotation.T @ weight[row], atol=1e-10)


def test_rotation_keeps_the_angle_between_gradient_and_code():
    x, code = torch.randn(30, LATENT, requires_grad=True), torch.randn(30, LATENT)
    weight = torch.randn(30, LATENT)
    (train_rqvae.rotate_to(x, code) * weight).sum().backward()
    after = torch.nn.functional.cosine_similarity(x.grad, x.detach(), dim=1)
    assert torch.allclose(after, torch.nn.functional.cosine_similarity(weight, code, dim=1), atol=1e-5)


HARD_ROWS = {
    "usual": (torch.randn(64, LATENT), torch.randn(64, LATENT)),
    "zero inputs": (torch.zeros(4, LATENT), torch.randn(4, LATENT)),
    "zero codes": (torch.randn(4, LATENT), torch.zeros(4, LATENT)),
    "both zero": (torch.zeros(4, LATENT), torch.zeros(4, LATENT)),
    "equal": (torch.ones(4, LATENT), torch.ones(4, LATENT)),
    "opposite": (torch.ones(4, LATENT), -2 * torch.ones(4, LATENT)),
    "tiny inputs": (1e-20 * torch.ones(4, LATENT), torch.randn(4, LATENT)),
    "large": (1e6 * torch.randn(4, LATENT), 1e-6 * torch.randn(4, LATENT)),
}


@pytest.mark.parametrize("estimator", [train_rqvae.rotate_to, train_rqvae.straight_through])
@pytest.mark.parametrize("rows", HARD_ROWS)
def test_estimators_return_exactly_the_code_and_a_finite_gradient(estimator, rows):
    x, code = HARD_ROWS[rows][0].clone().requires_grad_(), HARD_ROWS[rows][1].clone().requires_grad_()
    quantized = estimator(x, code)
    assert torch.equal(quantized, code)
    quantized.sum().backward()
    assert torch.isfinite(x.grad).all()
    assert code.grad is None  # the estimator never moves the code itself


def test_opposite_vectors_are_reflected_onto_the_code():
    x = torch.randn(6, LATENT, dtype=torch.float64, requires_grad=True)
    code = -3 * x.detach()
    (train_rqvae.rotate_to(x, code) * code).sum().backward()
    assert torch.allclose(x.grad, -3 * code)  # lambda = 3, and the code's direction is seen as minus itself


def test_straight_through_has_the_identity_as_its_gradient():
    x, weight = torch.randn(20, LATENT, requires_grad=True), torch.randn(20, LATENT)
    (train_rqvae.straight_through(x, torch.randn(20, LATENT)) * weight).sum().backward()
    assert torch.equal(x.grad, weight)


# ---------------------------------------------------------------- one level


@pytest.mark.parametrize("kind", [VectorQuantizer, EMAVectorQuantizer])
def test_vector_quantizer_losses_are_the_mean_squared_distances(kind):
    quantizer, x = kind(SIZE, LATENT), torch.randn(50, LATENT)
    output = quantizer(x)
    codebook = quantizer.codebook.detach()
    nearest = codebook[cdist(x.double(), codebook.double()).argmin(1)]
    mean_square = (x - nearest).double().square().mean().item()
    assert output.codebook_loss.item() == pytest.approx(mean_square, rel=1e-5)
    assert output.commitment_loss.item() == pytest.approx(mean_square, rel=1e-5)
    assert torch.equal(output.vectors, codebook[output.codes])


def test_codebook_loss_moves_only_codes_and_commitment_loss_only_inputs():
    quantizer, x = VectorQuantizer(SIZE, LATENT), torch.randn(50, LATENT, requires_grad=True)
    output, codebook = quantizer(x), quantizer.codebook
    toward = torch.zeros(SIZE, LATENT).index_add(0, output.codes, 2 / x.numel() * (codebook[output.codes] - x).detach())
    gradients = torch.autograd.grad(output.codebook_loss, [x, codebook], allow_unused=True, retain_graph=True)
    assert gradients[0] is None
    assert torch.allclose(gradients[1], toward, atol=1e-6)
    gradients = torch.autograd.grad(output.commitment_loss, [x, codebook], allow_unused=True)
    assert torch.allclose(gradients[0], 2 / x.numel() * (x - codebook[output.codes]).detach(), atol=1e-6)
    assert gradients[1] is None


def test_ema_codebook_follows_the_direct_sums_of_several_steps():
    quantizer, decay = EMAVectorQuantizer(SIZE, LATENT, ema_decay=0.7), 0.7
    counts, sums = np.ones(SIZE), quantizer.codebook.double().numpy().copy()
    for step in range(6):
        x = torch.randn(40, LATENT) + step
        before = quantizer.codebook.double().numpy().copy()
        codes = quantizer(x).codes.numpy()
        assert np.array_equal(codes, cdist(x.double(), before).argmin(1))
        quantizer.end_step()
        for code in range(SIZE):
            counts[code] = decay * counts[code] + (1 - decay) * (codes == code).sum()
            sums[code] = decay * sums[code] + (1 - decay) * x.double().numpy()[codes == code].sum(0)
        assert np.allclose(quantizer.ema_counts, counts, rtol=1e-5)
        assert np.allclose(quantizer.ema_sums, sums, rtol=1e-4, atol=1e-5)
        assert np.allclose(quantizer.codebook, sums / counts[:, None], rtol=1e-4, atol=1e-5)


def test_ema_codebook_of_two_half_batches_is_that_of_the_whole():
    x, quantizers = torch.randn(64, LATENT), []
    for parts in ([64], [40, 24]):
        torch.manual_seed(1)
        quantizers.append(EMAVectorQuantizer(SIZE, LATENT, ema_decay=0.5))
        for part in x.split(parts):
            quantizers[-1](part)
        quantizers[-1].end_step()
    for name, whole in quantizers[0].state_dict().items():
        assert torch.allclose(whole, quantizers[1].state_dict()[name], atol=1e-6), name


def test_ema_codes_without_items_keep_their_place():
    quantizer = EMAVectorQuantizer(4, 2, ema_decay=0.9)
    quantizer.set_codes(torch.arange(4), torch.tensor([[0.0, 0], [10, 0], [0, 10], [10, 10]]), torch.ones(4))
    for _ in range(500):
        quantizer(torch.full((8, 2), 1.0))
        quantizer.end_step()
    assert torch.allclose(quantizer.codebook[1:], torch.tensor([[10.0, 0], [0, 10], [10, 10]]), atol=1e-3)
    assert torch.allclose(quantizer.codebook[0], torch.ones(2), atol=1e-3)


def test_ema_counts_nothing_outside_training():
    quantizer = EMAVectorQuantizer(SIZE, LATENT).eval()
    before = quantizer.codebook.clone()
    quantizer(torch.randn(30, LATENT))
    quantizer.end_step()
    assert torch.allclose(quantizer.codebook, before, atol=1e-6)


@pytest.mark.parametrize(
    "look",
    [
        lambda model, x: torch.no_grad()(model)(x),
        lambda model, x: train_rqvae.init_codebooks(model, model.encode(x).detach(), 64, seed=0),
    ],
    ids=["forward", "init_codebooks"],
)
def test_a_look_at_the_catalogue_is_no_step_of_the_averages(look):
    model, x = RQVAE(tiny_config(use_ema_vq=True)).train(), clusters()
    look(model, x)
    assert [quantizer.step_sums.abs().sum().item() for quantizer in model.quantizers] == [0.0] * LEVELS


# ---------------------------------------------------------------- the residual walk


@pytest.mark.parametrize("changes", QUANTIZERS)
def test_walk_is_the_loop_by_hand(changes):
    model, latents = RQVAE(tiny_config(**changes)), torch.randn(100, LATENT)
    quantized = model.quantize(latents)
    left, codes = latents.double().numpy(), []
    for quantizer in model.quantizers:
        codebook = quantizer.codebook.detach().double().numpy()
        codes.append(cdist(left, codebook).argmin(1))
        left = left - codebook[codes[-1]]
    assert np.array_equal(quantized.codes, np.stack(codes, axis=1))
    assert np.allclose(quantized.residuals.detach(), left, atol=1e-5)
    assert torch.allclose(quantized.residuals + quantized.vectors, latents, atol=1e-5)
    assert torch.equal(quantized.vectors, model.decode_levels(quantized.codes))
    assert quantized.codes.dtype == torch.int64


@pytest.mark.parametrize("rotation", [False, True])
def test_walk_passes_the_gradient_once_from_the_sum_of_codes_to_the_latents(rotation):
    model, weight = RQVAE(tiny_config(use_rotation_trick=rotation)), torch.randn(30, LATENT)
    latents = torch.randn(30, LATENT, requires_grad=True)
    quantized = model.quantize(latents)
    (quantized.vectors * weight).sum().backward()
    for row in range(30):
        scale, matrix = 1.0, torch.eye(LATENT, dtype=torch.float64)
        if rotation:
            scale, matrix = rotation_of(latents[row].detach().double(), quantized.vectors[row].detach().double())
        assert torch.allclose(latents.grad[row].double(), scale * matrix.T @ weight[row].double(), atol=1e-4)
    assert all(quantizer.codebook.grad is None for quantizer in model.quantizers)  # that is the losses' part


def test_walk_can_change_a_codebook_just_before_it_is_used():
    model, seen = RQVAE(tiny_config()), []

    def zero(level, residuals):
        seen.append((level, residuals.clone()))
        model.quantizers[level].set_codes(torch.arange(SIZE), torch.zeros(SIZE, LATENT), torch.ones(SIZE))

    latents = torch.randn(10, LATENT)
    quantized = model.quantize(latents, before_level=zero)
    assert [level for level, _ in seen] == list(range(LEVELS))
    assert all(torch.equal(residuals, latents) for _, residuals in seen)
    assert torch.equal(quantized.vectors, torch.zeros(10, LATENT))


def test_search_of_every_id_finds_the_one_that_decodes_nearest():
    x = clusters()
    model = started_model(x, codebook_size=5)
    every = torch.tensor(list(itertools.product(range(5), repeat=LEVELS)))
    nearest = every[cdist(x, model.decode_from_semantic_ids(every)).argmin(1)]
    assert torch.equal(model.encode_to_semantic_ids(x, width=5**LEVELS), nearest)
    errors = []
    for width in (1, 4, 5**LEVELS):
        decoded = model.decode_from_semantic_ids(model.encode_to_semantic_ids(x, width=width))
        errors.append((x - decoded).square().mean().item())
    assert errors[0] > errors[1] > errors[2]


def test_losses_are_of_the_codes_that_decode_nearest_to_the_target():
    x = clusters()
    model, target = started_model(x), x.flip(0)
    codes = model(model.standardise(x), model.standardise(target), width=4).quantized.codes
    assert torch.equal(codes, model.search(model.encode(x), model.standardise(target), 4))
    assert not torch.equal(codes, model.search(model.encode(x), model.standardise(x), 4))
    assert not torch.equal(codes, model(model.standardise(x), model.standardise(target), width=1).quantized.codes)


def test_search_of_one_id_is_the_residual_walk():
    x = clusters()
    model = started_model(x)
    assert torch.equal(model.encode_to_semantic_ids(x, width=1), model.quantize(model.encode(x)).codes)


def test_search_does_not_depend_on_the_other_items():
    x = clusters()
    model = started_model(x)
    alone = torch.cat([model.encode_to_semantic_ids(row) for row in x[:50].split(1)])
    assert (alone == model.encode_to_semantic_ids(x)[:50]).float().mean() > 0.99  # near ties may turn


def test_walk_takes_the_codes_that_are_given():
    model, latents = RQVAE(tiny_config()), torch.randn(10, LATENT)
    codes = torch.randint(SIZE, (10, LEVELS))
    quantized = model.quantize(latents, codes)
    assert torch.equal(quantized.codes, codes)
    assert torch.equal(quantized.vectors, model.decode_levels(codes))
    assert torch.allclose(quantized.residuals, latents - model.decode_levels(codes), atol=1e-6)


# ---------------------------------------------------------------- the model


@pytest.mark.parametrize("beta", [0.0, 0.25, 2.0])
def test_total_loss_is_the_sum_of_its_terms(beta):
    x = clusters()
    model = started_model(x, commitment_weight=beta)
    losses = model(model.standardise(x))
    quantized = losses.quantized
    vq = sum(quantized.codebook_losses[level] + beta * quantized.commitment_losses[level] for level in range(LEVELS))
    assert losses.vq.item() == pytest.approx(vq.item(), rel=1e-5)
    assert losses.total.item() == pytest.approx(losses.reconstruction.item() + vq.item(), rel=1e-5)
    off = model.standardise(model.decode_from_semantic_ids(quantized.codes)) - model.standardise(x)
    assert losses.reconstruction.item() == pytest.approx(reconstruction_loss(off.detach()), rel=1e-4)


def test_plain_autoencoder_loss_has_no_quantization_in_it():
    x = clusters()
    model = started_model(x)
    losses = model(model.standardise(x), width=0)
    off = model.standardise(model.decode(model.encode(x))) - model.standardise(x)
    assert losses.quantized is None
    assert losses.total.item() == losses.reconstruction.item()
    assert losses.total.item() == pytest.approx(reconstruction_loss(off.detach()), rel=1e-4)


def test_loss_is_against_the_target_where_one_is_given():
    x = clusters()
    model = started_model(x)
    x, target = model.standardise(x), model.standardise(2 * x.flip(0))
    losses = model(x, target)
    decoded = model.standardise(model.decode_from_semantic_ids(losses.quantized.codes))
    assert losses.reconstruction.item() == pytest.approx(reconstruction_loss(decoded - target), rel=1e-4)
    assert model(x, target, width=1).vq.item() == model(x, width=1).vq.item()  # the input is x all the same


@pytest.mark.parametrize("changes", QUANTIZERS)
def test_every_parameter_gets_a_gradient(changes):
    x = clusters()
    model = started_model(x, **changes).train()
    before = [quantizer.codebook.detach().clone() for quantizer in model.quantizers]
    model(model.standardise(x)).total.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
    learned = {name for name, _ in model.named_parameters() if name.startswith("quantizers")}
    if changes["use_ema_vq"]:
        assert not learned
        for quantizer, codebook in zip(model.quantizers, before, strict=True):
            assert torch.equal(quantizer.codebook, codebook)  # not before the end of the step
            quantizer.end_step()
            assert not torch.equal(quantizer.codebook, codebook)
    else:
        assert learned == {f"quantizers.{level}.codebook" for level in range(LEVELS)}


def test_configuration_reaches_the_layers():
    model = RQVAE(tiny_config(use_ema_vq=True, ema_decay=0.5, encoder_hidden_dims=[20, 12]))
    shapes = [tuple(layer.weight.shape) for layer in model.encoder if hasattr(layer, "weight")]
    assert shapes == [(20, DIM), (12, 20), (LATENT, 12)]
    shapes = [tuple(layer.weight.shape) for layer in model.decoder if hasattr(layer, "weight")]
    assert shapes == [(12, LATENT), (20, 12), (DIM, 20)]
    assert [quantizer.ema_decay for quantizer in model.quantizers] == [0.5] * LEVELS


@pytest.mark.parametrize("changes", QUANTIZERS)
def test_ids_decode_to_the_sum_of_their_codes(changes):
    x = clusters()
    model = started_model(x, **changes).eval()
    ids = model.encode_to_semantic_ids(x)
    assert ids.shape == (300, LEVELS)
    assert ids.min() >= 0
    assert ids.max() < SIZE
    for length in range(1, LEVELS + 1):
        codes = sum(model.quantizers[level].codebook.detach()[ids[:, level]] for level in range(length))
        decoded = model.decode_from_semantic_ids(ids[:, :length])
        assert decoded.shape == x.shape
        assert torch.allclose(decoded, model.decode(codes), atol=1e-6)
    assert torch.equal(model.encode_to_semantic_ids(x), ids)


@pytest.mark.parametrize("ema", [False, True])
def test_ids_and_decoded_embeddings_can_be_trained_on(ema):
    model, x = RQVAE(tiny_config(use_ema_vq=ema)), clusters()
    ids = model.encode_to_semantic_ids(x)
    layer = torch.nn.Linear(DIM, 1)
    (layer(model.decode_from_semantic_ids(ids)).sum() + model.decode_levels(ids).sum()).backward()
    assert layer.weight.grad.abs().sum() > 0


def test_longer_prefixes_are_nearer_to_the_latents():
    x = clusters()
    model = started_model(x).requires_grad_(False)
    latents, ids = model.encode(x), model.encode_to_semantic_ids(x, width=1)
    off = [(latents - model.decode_levels(ids[:, :length])).square().sum().item() for length in range(1, LEVELS + 1)]
    assert off == sorted(off, reverse=True)
    assert off[-1] < off[0]


def test_a_shift_and_a_scale_of_the_embeddings_go_through():
    x, scale, shift = clusters(), 7.5, torch.randn(DIM)
    model = started_model(x)
    moved = RQVAE(model.config)
    moved.load_state_dict(model.state_dict())
    train_rqvae.fit_standardisation(moved, scale * x + shift)
    ids = model.encode_to_semantic_ids(x)
    assert (moved.encode_to_semantic_ids(scale * x + shift) == ids).float().mean() > 0.99  # near ties may turn
    decoded = model.decode_from_semantic_ids(ids)
    assert torch.allclose(moved.decode_from_semantic_ids(ids), scale * decoded + shift, atol=1e-4)


def test_standardised_embeddings_have_mean_zero_and_unit_variance():
    model, x = RQVAE(tiny_config()), 3 * clusters() + 5
    train_rqvae.fit_standardisation(model, x)
    inside = model.standardise(x)
    assert torch.allclose(inside.mean(0), torch.zeros(DIM), atol=1e-4)
    assert inside.square().mean().item() == pytest.approx(1, rel=1e-4)
    train_rqvae.fit_standardisation(model, torch.ones(10, DIM))  # all equal: nothing to divide by
    assert torch.equal(model.standardise(torch.ones(10, DIM)), torch.zeros(10, DIM))


# ---------------------------------------------------------------- k-means start and resets


def test_rescaling_latents_leaves_the_autoencoder_as_it_was():
    model, x = RQVAE(tiny_config()), clusters()
    latents, before = model.encode(x).detach(), model.decode(model.encode(x)).detach()
    rescaled = train_rqvae.rescale_latents(model, latents)
    assert torch.allclose(model.decode(model.encode(x)), before, atol=1e-5)
    assert torch.allclose(model.encode(x), rescaled, atol=1e-4)
    assert rescaled.std().item() == pytest.approx(1, rel=1e-5)
    assert torch.allclose(rescaled.mean(0), torch.zeros(LATENT), atol=1e-5)
    assert not torch.allclose(latents, rescaled, atol=0.1)  # there was something to do


def test_latents_that_differ_by_rounding_alone_are_not_blown_up():
    model = RQVAE(tiny_config())
    latents = torch.full((50, LATENT), 0.3) + 1e-8 * torch.randn(50, LATENT)
    rescaled = train_rqvae.rescale_latents(model, latents)
    assert rescaled.abs().max() < 1e-6


def test_codebook_gradient_is_bitwise_the_same_on_many_threads():
    quantizer, x = VectorQuantizer(256, 32), torch.randn(1024, 32)
    torch.set_num_threads(4)
    gradients = []
    for _ in range(100):
        quantizer.zero_grad()
        quantizer(x).codebook_loss.backward()
        gradients.append(quantizer.codebook.grad.clone())
    torch.set_num_threads(1)
    assert all(torch.equal(gradients[0], gradient) for gradient in gradients)


@pytest.mark.parametrize("ema", [False, True])
def test_codebooks_start_at_the_k_means_centres_of_each_levels_residuals(ema):
    model, latents = RQVAE(tiny_config(use_ema_vq=ema)), torch.randn(200, LATENT)
    train_rqvae.init_codebooks(model, latents, rows_per_step=64, seed=5)
    left = latents.numpy()
    for level, quantizer in enumerate(model.quantizers):
        kmeans = KMeans(SIZE, n_init=1, random_state=5 + level).fit(left)
        codebook = quantizer.codebook.detach().numpy()
        assert np.allclose(codebook, kmeans.cluster_centers_, atol=1e-5)
        codes = cdist(left, codebook).argmin(1)
        centres = np.stack([left[codes == code].mean(0) for code in range(SIZE)])
        assert np.allclose(codebook, centres, atol=0.2)  # each code is the middle of its items
        if ema:
            a_step = np.bincount(kmeans.labels_, minlength=SIZE) * 64 / 200  # items of each code in a step of 64
            assert np.allclose(quantizer.ema_counts, a_step, rtol=1e-5)
            assert torch.allclose(quantizer.ema_sums, quantizer.codebook * quantizer.ema_counts[:, None])
        left = left - codebook[codes]


def test_start_of_quantizing_keeps_the_function_and_forgets_the_moments():
    model, x = RQVAE(tiny_config()), clusters()
    optimizer = torch.optim.Adam(model.parameters())
    model(model.standardise(x), width=0).total.backward()
    optimizer.step()
    before = model.decode(model.encode(x)).detach()
    train_rqvae.start_quantizing(model, x, [optimizer], rows_per_step=64, seed=0)
    assert torch.allclose(model.decode(model.encode(x)), before, atol=1e-4)
    assert not optimizer.state
    counts = train_rqvae.code_statistics(model.encode_to_semantic_ids(x), SIZE)
    assert counts.usage == [1.0] * LEVELS


@pytest.mark.parametrize("ema", [False, True])
def test_reset_moves_unused_codes_onto_residuals_and_nothing_else(ema):
    x = clusters()
    model = started_model(x, use_ema_vq=ema).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(3):
        train_rqvae.train_step(model, [optimizer], x, torch.arange(300), noise=0.0, width=4)
    usage = torch.ones(LEVELS, SIZE, dtype=torch.int64)
    usage[0, [1, 4]] = usage[1, 7] = 0
    before, batch = tensors_of(model), x[50:100]
    moments = {name: optimizer.state[parameter] for name, parameter in model.named_parameters()}
    kept = {name: {k: v.clone() for k, v in state.items()} for name, state in moments.items()}

    assert train_rqvae.reset_codes(model, batch, usage, optimizer) == 3

    assert model.training
    left = model.encode(batch).detach()
    for level, quantizer in enumerate(model.quantizers):
        unused = usage[level] == 0
        codebook = quantizer.codebook.detach()
        assert torch.equal(codebook[~unused], before[f"quantizers.{level}.codebook"][~unused])
        for vector in codebook[unused]:
            assert (left == vector).all(1).any()
        if ema:
            assert torch.equal(quantizer.ema_sums[unused], codebook[unused])
            assert torch.equal(quantizer.ema_counts[unused], torch.ones(int(unused.sum())))
            assert torch.equal(quantizer.ema_counts[~unused], before[f"quantizers.{level}.ema_counts"][~unused])
            assert quantizer.step_sums.abs().sum() == 0
        else:
            for name in ("exp_avg", "exp_avg_sq"):
                now, then = (store[f"quantizers.{level}.codebook"][name] for store in (moments, kept))
                assert torch.equal(now[unused], torch.zeros_like(now[unused]))
                assert torch.equal(now[~unused], then[~unused])
                assert then[unused].abs().sum() > 0 or level == 2  # there was something to forget
        left = left - codebook[train_rqvae.nearest_codes(left, codebook)]
    for name, tensor in model.state_dict().items():
        if not name.startswith("quantizers"):
            assert torch.equal(tensor, before[name]), name


def test_reset_with_every_code_used_changes_nothing():
    model, x = started_model(clusters()), clusters()
    before = tensors_of(model)
    usage = torch.ones(LEVELS, SIZE, dtype=torch.int64)
    assert train_rqvae.reset_codes(model, x, usage, torch.optim.Adam(model.parameters())) == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


# ---------------------------------------------------------------- schedule, split, batches


@pytest.mark.parametrize(
    ("scheduler", "step", "expected"),
    [
        ("cosine", 0, 1.0),
        ("cosine", 500, 0.505),
        ("cosine", 1000, 0.01),
        ("cosine_with_warmup", 0, 0.01),
        ("cosine_with_warmup", 49, 0.5),
        ("cosine_with_warmup", 99, 1.0),
        ("cosine_with_warmup", 100, 1.0),
        ("cosine_with_warmup", 550, 0.505),
        ("cosine_with_warmup", 1000, 0.01),
        ("cosine_with_warmup", 5000, 0.01),
    ],
)
def test_learning_rate_rises_and_falls_as_the_flags_say(scheduler, step, expected):
    config = tiny_config(scheduler_type=scheduler, warmup_steps=100, max_lr=1.0, min_lr=0.01)
    assert train_rqvae.learning_rate(step, 1000, config) == pytest.approx(expected)


@pytest.mark.parametrize(("warmup", "total"), [(0, 1), (0, 50), (10, 10), (20, 10), (1, 2)])
def test_learning_rate_stays_within_its_bounds_in_short_runs(warmup, total):
    config = tiny_config(scheduler_type="cosine_with_warmup", warmup_steps=warmup, max_lr=1e-2, min_lr=1e-4)
    rates = [train_rqvae.learning_rate(step, total, config) for step in range(total)]
    assert all(0 < rate <= 1e-2 for rate in rates)
    peak = rates.index(max(rates))
    assert rates == sorted(rates[: peak + 1]) + sorted(rates[peak + 1 :], reverse=True)


def test_shuffled_rows_are_a_permutation_fixed_by_seed_and_epoch():
    rows = torch.arange(100, 200)
    orders = {(seed, epoch): train_rqvae.shuffled(rows, epoch, seed) for seed in (0, 1, 42) for epoch in range(5)}
    for (seed, epoch), order in orders.items():
        assert torch.equal(order.sort().values, rows)
        assert torch.equal(order, train_rqvae.shuffled(rows, epoch, seed))
    assert len({tuple(order.tolist()) for order in orders.values()}) == len(orders)


def test_shuffling_leaves_the_global_random_state_alone():
    before = torch.get_rng_state()
    train_rqvae.shuffled(torch.arange(50), 3, 0)
    train_rqvae.split_rows(50, tiny_config(val_split=0.2))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("n", "share", "held_out"), [(1000, 0.05, 50), (10, 0.5, 5), (300, 0.333, 100), (10, 0.99, 9)])
def test_split_is_disjoint_and_complete(n, share, held_out):
    train_rows, val_rows = train_rqvae.split_rows(n, tiny_config(val_split=share))
    assert len(val_rows) == held_out
    assert torch.equal(torch.cat([train_rows, val_rows]).sort().values, torch.arange(n))
    again = train_rqvae.split_rows(n, tiny_config(val_split=share))
    assert torch.equal(val_rows, again[1])
    other = train_rqvae.split_rows(n, tiny_config(val_split=share, seed=1))
    assert not torch.equal(val_rows, other[1])


def test_without_a_split_all_rows_are_both():
    train_rows, val_rows = train_rqvae.split_rows(20, tiny_config(val_split=0.0))
    assert torch.equal(train_rows.sort().values, torch.arange(20))
    assert torch.equal(val_rows.sort().values, torch.arange(20))


@pytest.mark.parametrize(
    ("changes", "rows_per_step", "steps_per_epoch", "total"),
    [
        ({"batch_size": 100, "num_epochs": 7, "max_steps": -1}, 100, 10, 70),
        ({"batch_size": 100, "num_epochs": 7, "max_steps": 25}, 100, 10, 25),
        ({"batch_size": 100, "gradient_accumulation_steps": 4, "num_epochs": 3, "max_steps": -1}, 400, 2, 6),
        ({"batch_size": 100_000, "num_epochs": 3, "max_steps": -1}, 1000, 1, 3),
        ({"batch_size": 100, "val_split": 0.1, "num_epochs": 1, "max_steps": -1}, 100, 9, 9),
    ],
)
def test_plan_counts_the_steps(changes, rows_per_step, steps_per_epoch, total):
    plan = train_rqvae.plan_training(1000, tiny_config(**{"val_split": 0.0} | changes))
    assert (plan.rows_per_step, plan.steps_per_epoch, plan.total_steps) == (rows_per_step, steps_per_epoch, total)
    assert plan.autoencoder_steps < total


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"autoencoder_steps": 13}, 13),
        ({"autoencoder_steps": 0}, 0),
        ({"autoencoder_steps": 13, "use_kmeans_init": False}, 0),
        ({"use_kmeans_init": False}, 0),
    ],
)
def test_plan_counts_the_autoencoder_steps(changes, expected):
    assert train_rqvae.plan_training(300, tiny_config(max_steps=100, **changes)).autoencoder_steps == expected


# ---------------------------------------------------------------- a step


def augmented(x: Tensor, noise: float, mixing: float) -> tuple[Tensor, Tensor, RQVAE]:
    model = RQVAE(tiny_config(item_embedding_dim=x.shape[1]))
    train_rqvae.fit_standardisation(model, x)
    inside = train_rqvae.augment(x, model, noise, mixing)
    noisy, target = (each * model.input_scale + model.input_mean for each in inside)
    return noisy, target, model


def test_without_noise_and_mixing_inputs_stay_as_they_are():
    x = clusters()
    noisy, target, _ = augmented(x, 0.0, 0.0)
    assert torch.equal(noisy, target)
    assert torch.allclose(target, x, atol=1e-5)


def test_noise_has_the_asked_size_and_is_not_in_the_target():
    x = 4 * clusters(4000, dim=70) + 2
    noisy, target, model = augmented(x, 0.5, 0.0)
    assert torch.allclose(target, x, atol=1e-5)
    noise = (noisy - x) / model.input_scale
    assert torch.allclose(noise.abs(), torch.tensor(0.5), atol=1e-4)
    assert noise.mean().item() == pytest.approx(0, abs=0.01)
    assert torch.corrcoef(noise.T).fill_diagonal_(0).abs().max().item() < 0.1  # no dimension goes with another
    assert torch.corrcoef(noise[:500]).fill_diagonal_(0).abs().max().item() < 0.8  # nor an item with another


def test_every_bit_is_one_sign():
    drawn = torch.randint(-(2**31), 2**31, (7, 3), dtype=torch.int32)
    signs = torch.copysign(torch.ones(()), train_rqvae.random_signs(drawn))
    bits = [[(word >> (31 - i)) & 1 for word in row for i in range(32)] for row in drawn.tolist()]
    assert torch.equal(signs, 1 - 2 * torch.tensor(bits).float())


@pytest.mark.parametrize("mixing", [0.3, 1.0, 10.0])
def test_mixing_keeps_mean_and_variance(mixing):
    x = clusters(20_000)[torch.randperm(20_000)] + 1
    noisy, target, model = augmented(x, 0.0, mixing)
    assert torch.equal(noisy, target)
    assert not torch.allclose(target, x, atol=0.1)
    inside = model.standardise(target)
    assert inside.square().mean().item() == pytest.approx(1, rel=0.05)
    assert inside.mean(0).abs().max().item() < 0.1


def test_mixing_stays_on_the_line_between_two_items_of_the_batch():
    x = clusters(100)
    _, target, model = augmented(x, 0.0, 0.5)
    mixed, centred = target - model.input_mean, x - model.input_mean
    for row in range(len(x)):
        fits = []
        for other in range(len(x)):
            pair = torch.stack([centred[row], centred[other]], dim=1).double()
            weights = torch.linalg.lstsq(pair, mixed[row].double()[:, None], driver="gelsd").solution
            fits.append((pair @ weights - mixed[row].double()[:, None]).norm().item())
            if fits[-1] < 1e-5 and other != row:
                assert weights.square().sum().item() == pytest.approx(1, abs=1e-3)  # so the variance is kept
                break
        assert min(fits) < 1e-5


WAITING = {  # for a number, for a shape that depends on numbers, or for a tensor made of Python numbers to be copied
    "_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "masked_scatter", "bincount", "_unique2",
    "unique_dim", "unique_consecutive", "repeat_interleave", "lift_fresh",
}  # fmt: skip


class Dispatched(TorchDispatchMode):
    """Counts what reaches the device, by the name of the operator."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name = operator.overloadpacket.__name__
        if name in ("index", "index_put_") and any(i is not None and i.dtype == torch.bool for i in args[1]):
            name = "nonzero"
        self.counts[name] += 1
        return operator(*args, **(kwargs or {}))


def test_what_makes_the_host_wait_is_seen():
    x = torch.arange(3.0)
    for wait in (x.max().item, x.nonzero, lambda: x[x > 1], lambda: bool(x.max() > 1), lambda: torch.tensor(1.0)):
        with Dispatched() as dispatched:
            wait()
        assert WAITING & dispatched.counts.keys()


@pytest.mark.parametrize("width", [0, 1, 4])
@pytest.mark.parametrize("changes", QUANTIZERS)
def test_no_step_of_one_process_makes_the_host_wait_for_the_device(changes, width, monkeypatch):
    monkeypatch.setattr(train_rqvae, "TRAINED_PER_PASS", {})  # as on a GPU
    x, model = clusters(), RQVAE(tiny_config(gradient_accumulation_steps=2, **changes))
    optimizers = train_rqvae.make_optimizers(model, 1e-3)
    with Dispatched() as dispatched:
        train_rqvae.train_step(model, optimizers, x, torch.arange(128), 0.5, width)
    assert dispatched.counts["addmm"] > 10
    assert not WAITING & dispatched.counts.keys()


@pytest.mark.parametrize("clip", [0.0, 0.5])
@pytest.mark.parametrize("changes", QUANTIZERS)
def test_small_batches_and_passes_equal_one_large_batch(changes, clip, monkeypatch):
    x, models = clusters(), []
    for size, rows_per_pass in ((300, 300), (64, 300), (300, 70)):  # 64 and 70 leave a smaller last one
        torch.manual_seed(3)
        monkeypatch.setattr(train_rqvae, "TRAINED_PER_PASS", {"cpu": rows_per_pass})
        flags = {"batch_size": size, "input_noise": 0.0, "input_mixing": 0.0, "gradient_clip_norm": clip}
        model = started_model(x, **changes, **flags).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
        terms = []
        for epoch in range(5):
            rows = train_rqvae.shuffled(torch.arange(300), epoch, 0)
            result = train_rqvae.train_step(model, [optimizer], x, rows, noise=0.0, width=4)
            terms.append(torch.cat([result.terms, result.gradient_norm.reshape(1)]))
            assert result.codes.shape == (300, LEVELS)
        models.append((tensors_of(model), torch.stack(terms)))
    for weights, terms in models[1:]:
        assert torch.allclose(models[0][1], terms, rtol=1e-4)
        for name, tensor in models[0][0].items():
            assert torch.allclose(tensor, weights[name], rtol=1e-4, atol=2e-5), name


@pytest.mark.parametrize("clip", [0.0, 0.01, 1e9])
def test_step_uses_the_clipped_gradient_and_tells_its_norm_before(clip):
    x = clusters()
    model = started_model(x, gradient_clip_norm=clip)
    before = torch.cat([parameter.detach().flatten().clone() for parameter in model.parameters()])
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    norm = train_rqvae.train_step(model, [optimizer], x, torch.arange(300), noise=0.0, width=4).gradient_norm.item()
    moved = torch.cat([parameter.detach().flatten() for parameter in model.parameters()]) - before
    assert norm > 0.01
    assert moved.norm().item() == pytest.approx(min(norm, clip or math.inf), rel=1e-3)
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in model.parameters())


def test_autoencoder_steps_leave_the_codebooks_alone():
    x = clusters()
    for ema in (False, True):
        model = RQVAE(tiny_config(use_ema_vq=ema)).train()
        before = tensors_of(model)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        result = train_rqvae.train_step(model, [optimizer], x, torch.arange(300), noise=0.0, width=0)
        assert result.codes is None
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, before[name]) == (name.startswith("quantizers") or "input" in name), name


@pytest.mark.parametrize("changes", QUANTIZERS)
@pytest.mark.parametrize(("hidden", "inner"), [([], 0), ([32], 0), ([32, 16], 2), ([32, 16, 12], 4)])
def test_every_parameter_is_in_one_optimizer_and_muon_has_the_inner_matrices(changes, hidden, inner):
    model = RQVAE(tiny_config(encoder_hidden_dims=hidden, **changes))
    optimizers = train_rqvae.make_optimizers(model, 1e-3)
    optimized = [id(parameter) for each in optimizers for group in each.param_groups for parameter in group["params"]]
    assert sorted(optimized) == sorted(map(id, model.parameters()))
    muon = [parameter for each in optimizers[1:] for group in each.param_groups for parameter in group["params"]]
    assert len(muon) == inner
    outer = {DIM, LATENT}
    assert all(parameter.ndim == 2 and not outer & set(parameter.shape) for parameter in muon)


# ---------------------------------------------------------------- evaluation


def test_code_statistics_are_those_of_numpy():
    codes = np.random.default_rng(0).integers(6, size=(500, 2)) ** 2 % 8
    found = train_rqvae.code_statistics(torch.from_numpy(codes), 8)
    for level in range(2):
        counts = np.bincount(codes[:, level], minlength=8)
        assert np.array_equal(found.counts[level], counts)
        share = counts / 500
        assert found.usage[level] == pytest.approx((share > 0).mean())
        entropy = -sum(p * math.log(p) for p in share if p)
        assert found.perplexity[level] == pytest.approx(math.exp(entropy))
    counts = Counter(map(tuple, codes.tolist()))
    assert found.distinct == pytest.approx(len(counts) / 500)
    assert found.singleton == pytest.approx(sum(count == 1 for count in counts.values()) / 500)
    assert found.largest == max(counts.values())


def test_code_statistics_at_the_extremes():
    equal = train_rqvae.code_statistics(torch.zeros(10, 3, dtype=torch.int64), 4)
    assert equal[1:] == ([0.25] * 3, [1.0] * 3, 0.1, 0.0, 10)
    assert equal.counts.tolist() == [[10, 0, 0, 0]] * 3
    codes = torch.tensor(list(itertools.product(range(4), repeat=2)))
    even = train_rqvae.code_statistics(codes, 4)
    assert even[1:] == ([1.0] * 2, [pytest.approx(4.0)] * 2, 1.0, 1.0, 1)
    assert even.counts.tolist() == [[4] * 4] * 2


def test_validation_is_over_the_held_out_rows_and_the_whole_catalogue(monkeypatch):
    x = clusters()
    model, rows = started_model(x).train(), torch.arange(250, 300)
    with torch.no_grad():
        losses = model(model.standardise(x[rows]))
        codes = model.encode_to_semantic_ids(x, train_rqvae.TRAINING_SEARCH_WIDTH)
        residuals = model.encode(x) - model.decode_levels(codes)
    statistics = train_rqvae.code_statistics(codes, SIZE)
    for size in (32768, 7):
        monkeypatch.setitem(train_rqvae.DECODED_PER_PASS, "cpu", size)
        found = train_rqvae.validate(model, x, rows)
        assert model.training
        assert found["val/total_loss"] == pytest.approx(losses.total.item(), rel=1e-4)
        assert found["val/reconstruction_loss"] == pytest.approx(losses.reconstruction.item(), rel=1e-4)
        for level in range(LEVELS):
            loss = losses.quantized.commitment_losses[level].item()
            assert found[f"val/commitment_loss_{level}"] == pytest.approx(loss, rel=1e-4)
            assert found[f"catalogue/usage_{level}"] == pytest.approx(statistics.usage[level])
            assert found[f"catalogue/perplexity_{level}"] == pytest.approx(statistics.perplexity[level], rel=0.05)
        assert found["catalogue/distinct"] == pytest.approx(statistics.distinct, abs=0.01)
        assert found["catalogue/residual_norm"] == pytest.approx(residuals.norm(dim=1).mean().item(), rel=1e-4)


# ---------------------------------------------------------------- quality of the IDs


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def test_reconstruction_quality_is_that_of_numpy():
    x = clusters() + 0.2
    model = started_model(x)
    decoded = model.decode_from_semantic_ids(model.encode_to_semantic_ids(x))
    real, guess = x.double().numpy(), decoded.double().numpy()
    unexplained = ((real - guess) ** 2).sum() / ((real - real.mean(0)) ** 2).sum()
    cosine = (unit(real) * unit(guess)).sum(1).mean()
    found = train_rqvae.reconstruction_quality(x, decoded)
    assert found == (pytest.approx(unexplained, rel=1e-4), pytest.approx(cosine, rel=1e-4))


def test_items_all_alike_have_no_variance_to_explain():
    x = torch.full((9, 4), 0.3)
    assert train_rqvae.reconstruction_quality(x, x) == (None, pytest.approx(1))


def test_neighbour_recall_is_that_of_brute_force():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 6, generator=generator)
    decoded = x + torch.randn(200, 6, generator=generator)
    queries = torch.arange(0, 200)  # more than go through at once
    shares = []
    for query in queries.tolist():
        nearest = []
        for catalogue in (x, decoded):
            cosine = unit(catalogue.double().numpy()) @ unit(x.double().numpy())[query]
            cosine[query] = -2
            nearest.append(set(np.argsort(-cosine)[:10].tolist()))
        shares.append(len(nearest[0] & nearest[1]) / 10)
    found = train_rqvae.neighbour_recall(x, decoded, queries)
    assert 0.2 < found < 0.8
    assert found == pytest.approx(np.mean(shares))
    assert train_rqvae.neighbour_recall(x, 3 * x, torch.arange(200)) == 1  # cosine knows no length


def test_neighbour_recall_of_very_few_items():
    x = torch.randn(4, 3)
    assert train_rqvae.neighbour_recall(x, -x, torch.arange(4)) == 1  # all the others are among the nearest ten
    assert train_rqvae.neighbour_recall(x[:1], x[:1], torch.arange(1)) is None


def test_coherence_is_the_mean_cosine_of_pairs_that_share_their_codes():
    generator = np.random.default_rng(0)
    codes = generator.integers(3, size=(60, 2))
    x = generator.normal(size=(60, 5)) + 2 * np.eye(5)[codes[:, 0]]
    cosine = unit(x) @ unit(x).T
    pairs = ~np.eye(60, dtype=bool)
    for level in (0, 1, 2):
        same = (codes[:, None, :level] == codes[None, :, :level]).all(2) & pairs  # (N, N)
        weights = same / np.maximum(same.sum(1, keepdims=True), 1)  # every item in company counts once
        expected = (weights * cosine).sum() / weights.sum()
        found = train_rqvae.coherence(torch.from_numpy(x).float(), codes, level, seed=0)
        assert found == pytest.approx(expected, abs=0.01)


def test_coherence_where_nothing_is_shared():
    codes = np.arange(5).reshape(5, 1)
    assert train_rqvae.coherence(torch.randn(5, 3), codes, 1, seed=0) is None


def test_quality_is_of_these_ids(monkeypatch):
    x = clusters()
    model = started_model(x)
    encoded = model.encode_to_semantic_ids(x).numpy()
    written = encoded.copy()
    written[:30, -1] = (written[:30, -1] + 1) % SIZE
    quality = train_rqvae.measure_quality(model, x, encoded, written)
    json.dumps(quality, allow_nan=False)
    assert quality["items"] == quality["sampled_items"] == len(x)
    assert quality["displaced"] == pytest.approx(30 / len(x))
    for when, codes in (("as_encoded", encoded), ("as_written", written)):
        decoded = model.decode_from_semantic_ids(torch.from_numpy(codes))
        counts = np.unique(codes, axis=0, return_counts=True)[1]
        unexplained, cosine = train_rqvae.reconstruction_quality(x, decoded)
        assert quality[when] == {
            "distinct": pytest.approx(len(counts) / len(x)),
            "singleton": pytest.approx((counts == 1).sum() / len(x)),
            "largest_collision": counts.max(),
            "unexplained_variance": pytest.approx(unexplained),
            "mean_cosine": pytest.approx(cosine),
            "recall_at_10": pytest.approx(train_rqvae.neighbour_recall(x, decoded, torch.arange(len(x))), abs=1e-3),
        }
    for level, found in enumerate(quality["levels"]):
        counts = np.bincount(encoded[:, level], minlength=SIZE)
        assert found["items_per_code"] == counts.tolist()
        assert found["dead_codes"] == (counts == 0).sum() == round((1 - found["usage"]) * SIZE)
        share = counts[counts > 0] / len(x)
        assert found["entropy_ratio"] == pytest.approx(-(share * np.log(share)).sum() / math.log(SIZE))
        decoded = model.decode_from_semantic_ids(torch.from_numpy(encoded[:, : level + 1]))
        expected = train_rqvae.reconstruction_quality(x, decoded)
        assert (found["unexplained_variance"], found["mean_cosine"]) == pytest.approx(expected)

    monkeypatch.setattr(train_rqvae, "QUALITY_ROWS", 50)
    sampled = train_rqvae.measure_quality(model, x, encoded, written)
    assert sampled["sampled_items"] == 50
    assert sampled["as_encoded"]["distinct"] == quality["as_encoded"]["distinct"]  # counts are of all items
    assert sampled["as_encoded"]["mean_cosine"] != quality["as_encoded"]["mean_cosine"]
    assert sampled["as_encoded"]["mean_cosine"] == pytest.approx(quality["as_encoded"]["mean_cosine"], abs=0.1)


def test_bar_chart_falls_from_the_commonest_code_to_the_rarest():
    assert train_rqvae.bar_chart([0, 8, 4, 1]) == "█▄▁ "
    assert train_rqvae.bar_chart([5] * 300) == "█" * train_rqvae.BAR_COLUMNS


# ---------------------------------------------------------------- distinct IDs


def is_distinct(codes: np.ndarray) -> bool:
    return len(np.unique(codes, axis=0)) == len(codes)


def nearest_walk(latents: np.ndarray, codebooks: np.ndarray) -> np.ndarray:
    left, codes = latents.copy(), []
    for codebook in codebooks:
        codes.append(cdist(left, codebook).argmin(1))
        left = left - codebook[codes[-1]]
    return np.stack(codes, axis=1)


def example(n: int, levels: int, size: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Latents, their codes as a model would give them, and codebooks that get finer."""
    generator = np.random.default_rng(seed)
    latents = generator.normal(size=(n, 4))
    codebooks = generator.normal(size=(levels, size, 4)) / 2.0 ** np.arange(levels)[:, None, None]
    return latents, nearest_walk(latents, codebooks), codebooks


def assigned(latents: np.ndarray, codes: np.ndarray, codebooks: np.ndarray, taken=()) -> np.ndarray:
    """With the squared distances of the residuals as costs, and none of the taken IDs."""

    def last_costs(groups, prefixes):
        above = [sum(book[code] for book, code in zip(codebooks, prefix, strict=False)) for prefix in prefixes]
        return [cdist(latents[group] - base, codebooks[-1]) ** 2 for group, base in zip(groups, above, strict=True)]

    taken = np.array(taken, dtype=np.int64).reshape(-1, codes.shape[1])
    return train_rqvae.assign_distinct(latents, codes, codebooks, last_costs, taken)


@st.composite
def catalogues(draw):
    levels, size = draw(st.integers(1, 3)), draw(st.integers(2, 4))
    n = draw(st.integers(1, size**levels))
    generator = np.random.default_rng(draw(st.integers(0, 10_000)))
    high = draw(st.integers(1, size))  # few codes make many collisions
    codes = generator.integers(high, size=(n, levels))
    return generator.normal(size=(n, 3)), codes, generator.normal(size=(levels, size, 3))


@settings(max_examples=150, deadline=None)
@given(catalogues())
def test_any_codes_become_distinct_and_only_crowded_prefixes_change(catalogue):
    latents, codes, codebooks = catalogue
    size = codebooks.shape[1]
    given_codes = codes.copy()
    found = assigned(latents, codes, codebooks)
    assert np.array_equal(codes, given_codes)  # the input stays
    assert found.shape == codes.shape
    assert is_distinct(found)
    assert found.min() >= 0
    assert found.max() < size
    if is_distinct(codes):
        assert np.array_equal(found, codes)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 3), st.integers(2, 4), st.integers(0, 10_000), st.booleans())
def test_as_many_items_as_ids_take_them_all(levels, size, seed, equal):
    latents, codes, codebooks = example(size**levels, levels, size, seed)
    if equal:
        latents, codes = np.repeat(latents[:1], len(latents), axis=0), np.repeat(codes[:1], len(codes), axis=0)
    found = assigned(latents, codes, codebooks)
    every = np.array(list(itertools.product(range(size), repeat=levels)))
    assert np.array_equal(found[np.lexsort(found.T[::-1])], every)


@pytest.mark.parametrize("seed", range(5))
def test_last_codes_have_the_least_cost_of_all_permutations(seed):
    latents, codes, codebooks = example(7, 2, 5, seed)
    codes[:, 0] = [0, 0, 0, 0, 1, 1, 2]  # each first code has room for its items
    codes[:, 1] = [3, 3, 1, 1, 2, 2, 4]
    found = assigned(latents, codes, codebooks)
    assert np.array_equal(found[:, 0], codes[:, 0])
    for first in range(3):
        rows = np.flatnonzero(codes[:, 0] == first)
        cost = cdist(latents[rows] - codebooks[0][first], codebooks[1]) ** 2
        items = range(len(rows))
        if first == 2:  # alone with its ID: stays, though another code may be nearer
            assert np.array_equal(found[rows], codes[rows])
            continue
        least = min(sum(cost[i, way[i]] for i in items) for way in itertools.permutations(range(5), len(rows)))
        assert sum(cost[i, found[rows[i], 1]] for i in items) == pytest.approx(least)


@settings(max_examples=150, deadline=None)
@given(catalogues(), st.floats(0, 1))
def test_no_id_of_another_item_is_given_however_many_are_taken(catalogue, share):
    latents, codes, codebooks = catalogue
    levels, size, _ = codebooks.shape
    every = np.array(list(itertools.product(range(size), repeat=levels)))
    spare = len(every) - len(codes)  # at a share of 1, no ID is left over
    taken = np.random.default_rng(len(codes)).permutation(every)[: round(share * spare)]
    found = assigned(latents, codes, codebooks, taken)
    assert found.shape == codes.shape
    assert is_distinct(np.concatenate([found, taken]))
    if is_distinct(np.concatenate([codes, taken])):
        assert np.array_equal(found, codes)


@pytest.mark.parametrize("seed", range(5))
def test_last_codes_have_the_least_cost_of_all_that_are_free(seed):
    latents, codes, codebooks = example(3, 2, 5, seed)
    codes[:] = [0, 2]
    found = assigned(latents, codes, codebooks, [[0, 2], [0, 4], [1, 0], [1, 1]])
    cost = cdist(latents - codebooks[0][0], codebooks[1]) ** 2
    least = min(sum(cost[range(3), way]) for way in itertools.permutations([0, 1, 3]))
    assert sum(cost[range(3), found[:, 1]]) == pytest.approx(least)


def test_prefixes_without_collisions_stay_bit_for_bit():
    latents, codes, codebooks = example(60, 3, 8, seed=1)
    prefixes = [tuple(row) for row in codes[:, :2].tolist()]
    ids = Counter(map(tuple, codes.tolist()))
    crowded = {tuple(row[:2]) for row in codes.tolist() if ids[tuple(row)] > 1}
    kept = np.array([prefix not in crowded for prefix in prefixes])
    found = assigned(latents, codes, codebooks)
    assert 0 < kept.sum() < 60
    assert np.array_equal(found[kept], codes[kept])
    assert not np.array_equal(found, codes)


def test_a_prefix_with_more_items_than_codes_gives_away_only_the_surplus():
    latents, codes, codebooks = example(12, 2, 4, seed=2)
    codes[:, 0] = [0] * 9 + [1, 2, 3]
    found = assigned(latents, codes, codebooks)
    assert is_distinct(found)
    moved = found[:, 0] != codes[:, 0]
    assert moved.sum() == 5  # nine items, room for four
    assert not moved[9:].any()


def test_the_items_that_lose_least_are_the_ones_that_move():
    codebooks = np.array([[[0.0, 0], [10, 0]], [[0, 1.0], [0, -1]]])
    latents = np.array([[0.1, 1], [0.2, -1], [4.9, 1], [0.0, 1]])
    codes = np.array([[0, 0], [0, 1], [0, 0], [0, 0]])
    found = assigned(latents, codes, codebooks)
    assert found[2].tolist() == [1, 0]
    assert is_distinct(found)
    assert (found[:, 0] == 1).sum() == 2


def test_assignment_gives_the_same_ids_to_items_in_another_order():
    latents, codes, codebooks = example(200, 3, 8, seed=3)
    found = assigned(latents, codes, codebooks)
    order = np.random.default_rng(0).permutation(200)
    again = assigned(latents[order], codes[order], codebooks)
    assert np.array_equal(again, found[order])  # no two of these latents are equal


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_last_codes_are_those_that_decode_with_the_least_error(levels, monkeypatch):
    monkeypatch.setitem(train_rqvae.DECODED_PER_PASS, "cpu", 3 * SIZE)  # the IDs below three prefixes
    n = {1: 7}.get(levels, 60)
    x = clusters(n)
    model = started_model(clusters(), codebook_quantization_levels=levels)
    order = np.random.default_rng(0).permutation(n)
    latents = model.encode(x[order]).detach()
    codes = np.zeros((n, levels), dtype=np.int64)
    codes[:, -1] = 3  # the same for all but the level above it, which has room for its items
    if levels > 1:
        codes[:, -2] = np.arange(n) % SIZE
    found = train_rqvae.make_distinct(model, x, order, latents, codes, "assign", codes[:0])
    assert np.array_equal(found[:, :-1], codes[:, :-1])
    for rows in train_rqvae.group_rows(train_rqvae.prefix_keys(codes, levels - 1)):
        every = np.repeat(codes[rows[:1]], SIZE, axis=0)
        every[:, -1] = np.arange(SIZE)
        cost = cdist(x[order[rows]], model.decode_from_semantic_ids(torch.from_numpy(every))) ** 2
        least = cost[linear_sum_assignment(cost)].sum()
        assert cost[np.arange(len(rows)), found[rows, -1]].sum() == pytest.approx(least, rel=1e-5)


def test_suffix_counts_the_items_of_equal_codes_in_their_order():
    codes = np.array([[1, 2], [0, 0], [1, 2], [0, 1], [1, 2], [0, 0]])
    found = train_rqvae.count_within(codes, np.empty((0, 3), dtype=np.int64))
    assert np.array_equal(found[:, :2], codes)
    assert found[:, 2].tolist() == [0, 0, 1, 0, 2, 1]


@settings(max_examples=80, deadline=None)
@given(catalogues())
def test_suffix_is_the_rank_among_equals(catalogue):
    codes, seen = catalogue[1], Counter()
    nothing = np.empty((0, codes.shape[1] + 1), dtype=np.int64)
    for row, suffix in zip(codes.tolist(), train_rqvae.count_within(codes, nothing)[:, -1], strict=True):
        assert suffix == seen[tuple(row)]
        seen[tuple(row)] += 1


def test_suffix_goes_on_from_those_that_are_taken():
    codes = np.array([[1, 2], [0, 0], [1, 2], [3, 3]])
    taken = np.array([[1, 2, 5], [1, 2, 0], [0, 0, 0], [2, 2, 9]])
    assert train_rqvae.count_within(codes, taken)[:, 2].tolist() == [6, 1, 7, 0]


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 50), st.integers(1, 5), st.integers(0, 2**31 - 1))
def test_packed_numbers_come_back(n, width, top):
    numbers = np.random.default_rng(n).integers(top, size=(n, width), endpoint=True)
    numbers = numbers[numbers[:, 0].argsort()]
    found = train_rqvae.unpacked(train_rqvae.packed(numbers), width)
    assert found.dtype == np.int64
    assert np.array_equal(found, numbers)


@pytest.mark.parametrize("level", [0, 1, 2, 3])
def test_prefix_keys_are_equal_exactly_where_prefixes_are(level):
    codes = np.random.default_rng(0).integers(300, size=(400, 3)) % [3, 4, 300]
    keys = train_rqvae.prefix_keys(codes, level)
    pairs = {(tuple(row), key) for row, key in zip(codes[:, :level].tolist(), keys.tolist(), strict=True)}
    assert len(pairs) == len({row for row, _ in pairs}) == len({key for _, key in pairs})


# ---------------------------------------------------------------- files


def write_catalogue(path, x: Tensor, kind=None, **columns) -> None:
    kind = kind or pl.List(pl.Float32)
    names = [f"B{row:03}" for row in range(len(x))]
    table = pl.DataFrame({"parent_asin": names, "embedding": pl.Series(x.tolist(), dtype=kind)} | columns)
    table.write_parquet(path)


@pytest.mark.parametrize("kind", [pl.List(pl.Float32), pl.List(pl.Float64), pl.Array(pl.Float32, DIM)], ids=str)
def test_dataset_is_the_file_bit_for_bit(tmp_path, kind):
    x = clusters(20)
    write_catalogue(tmp_path / "a.parquet", x, kind, title=["title"] * 19 + [None], item_context=["text"] * 20)
    dataset = train_rqvae.EmbeddingDataset(tmp_path / "a.parquet")
    assert len(dataset) == 20
    assert dataset.embeddings.dtype == torch.float32
    assert torch.equal(dataset.embeddings, x)
    assert torch.equal(dataset[torch.tensor([3, 5])], x[[3, 5]])
    assert dataset.parent_asin.to_list() == [f"B{row:03}" for row in range(20)]
    assert dataset.labels.to_list() == ["title"] * 19 + ["text"]
    assert torch.equal(train_rqvae.EmbeddingDataset(tmp_path / "a.parquet", num_rows=7).embeddings, x[:7])


@pytest.mark.parametrize("claimed", ["0", "1", "7", "8", "20", "8192", "-8", "99999999999999999999", "no number"])
def test_dataset_is_read_whole_in_pieces_of_any_size(tmp_path, claimed, monkeypatch):
    monkeypatch.setattr(train_rqvae, "LEAST_ROWS_READ", 1)
    x = clusters(20)
    table = pl.DataFrame({"parent_asin": [f"B{row}" for row in range(20)], "embedding": x.numpy()})
    table = table.cast({"embedding": pl.List(pl.Float32)})
    table.write_parquet(tmp_path / "a.parquet", row_group_size=8, metadata={"rows_per_group": claimed})
    assert torch.equal(train_rqvae.EmbeddingDataset(tmp_path / "a.parquet").embeddings, x)
    assert torch.equal(train_rqvae.EmbeddingDataset(tmp_path / "a.parquet", num_rows=13).embeddings, x[:13])


@pytest.mark.parametrize(
    ("columns", "label"),
    [
        ({"item_context": ["text"] * 5}, "text"),
        ({"title": [" \n"] * 5, "item_context": ["text"] * 5}, "text"),
        ({"title": [7] * 5}, "B000"),
        ({}, "B000"),
    ],
    ids=["no title", "a blank title", "a number as title", "no text at all"],
)
def test_labels_are_the_best_text_there_is(tmp_path, columns, label):
    write_catalogue(tmp_path / "a.parquet", clusters(5), **columns)
    assert train_rqvae.EmbeddingDataset(tmp_path / "a.parquet").labels[0] == label


@pytest.mark.parametrize("title", [["a", "b"], {"en": "a"}, b"\xff"], ids=["list", "struct", "bytes"])
def test_a_title_of_an_odd_kind_is_no_reason_to_stop(tmp_path, title):
    write_catalogue(tmp_path / "a.parquet", clusters(5), title=[title] * 5)
    assert len(train_rqvae.EmbeddingDataset(tmp_path / "a.parquet").labels) == 5


@pytest.mark.parametrize("changes", QUANTIZERS)
def test_a_saved_model_comes_back_bit_for_bit(tmp_path, changes):
    x = clusters()
    model = started_model(x, **changes)
    train_rqvae.save_checkpoint(tmp_path / "a.pth", model, 5, 1, 0.5)
    loaded = train_rqvae.load_model(tmp_path / "a.pth", "cpu")
    assert not loaded.training
    assert loaded.config == model.config
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(loaded.encode_to_semantic_ids(x), model.eval().encode_to_semantic_ids(x))


@pytest.mark.parametrize("trouble", [ValueError("x"), KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_a_file_half_written_never_takes_the_place_of_a_whole_one(tmp_path, trouble):
    path = tmp_path / "a.bin"
    path.write_bytes(b"whole")

    def write_half():
        with train_rqvae.replacing(path) as temporary:
            temporary.write_bytes(b"half")
            raise trouble

    with pytest.raises((ValueError, KeyboardInterrupt, SystemExit)):
        write_half()
    assert path.read_bytes() == b"whole"
    assert list(tmp_path.iterdir()) == [path]


def test_digest_tells_other_embeddings_apart():
    x = clusters(3001).numpy()  # any item counts, of more than a sample would see
    other = x.copy()
    other[1717, 3] += 1e-6
    assert train_rqvae.data_digest(x) == train_rqvae.data_digest(x.copy())
    assert len({train_rqvae.data_digest(each) for each in (x, other, x[:-1], x[::-1], x[:, :-1])}) == 5
