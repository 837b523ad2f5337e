"""The parts of train_rqvae.py against references: brute force, numpy, scikit-learn and float64 formulas."""

import itertools
import json
import math
from collections import Counter
from dataclasses import asdict

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

import train_rqvae
from train_rqvae import RQVAE, EMAVectorQuantizer, EmbeddingDataset, RQVAEConfig, VectorQuantizer

DIM, LATENT, SIZE, LEVELS = 24, 8, 8, 3
CPU = torch.device("cpu")
QUANTIZERS = [
    pytest.param({"use_rotation_trick": rotation, "use_ema_vq": ema}, id=f"{way}-{kind}")
    for rotation, way in ((False, "straight"), (True, "rotation"))
    for ema, kind in ((False, "gradient"), (True, "ema"))
]


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
    model, rows = RQVAE(tiny_config(**changes)), torch.arange(len(x))
    train_rqvae.fit_standardisation(model, x, rows)
    train_rqvae.start_quantizing(model, x, rows, items_per_step=64)
    return model


@pytest.fixture(scope="module")
def x() -> Tensor:
    return clusters()


@pytest.fixture(scope="module")
def model(x) -> RQVAE:
    """A model of x in evaluation mode, which no test changes."""
    torch.manual_seed(0)
    return started_model(x).eval().requires_grad_(False)


def reconstruction_loss(difference) -> float:
    """Of standardised embeddings minus their reconstructions (B, D), in float64."""
    errors, scale = (np.asarray(difference, dtype=np.float64) ** 2).mean(1), train_rqvae.ERROR_SCALE
    return float(train_rqvae.RECONSTRUCTION_WEIGHT * scale * np.log(1 + errors / scale).mean())


def tensors_of(model: RQVAE) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


# ---------------------------------------------------------------- configuration


@pytest.mark.parametrize(
    ("levels", "sizes", "expected"),
    [(None, [9], [9] * 3), (2, 9, [9] * 2), (4, [9], [9] * 4), (None, [12, 5], [12, 5]), (2, [12, 5], [12, 5])],
)
def test_codebook_sizes_are_one_for_all_levels_or_one_a_level(levels, sizes, expected):
    config = RQVAEConfig(codebook_quantization_levels=levels, codebook_size=sizes)
    assert (config.codebook_quantization_levels, config.codebook_size) == (len(expected), expected)
    assert RQVAEConfig(**asdict(config)) == config


# ---------------------------------------------------------------- nearest codes and the two estimators


@pytest.mark.parametrize(("n", "size", "dim"), [(200, 16, 8), (1, 2, 1), (50, 256, 32)])
def test_nearest_codes_are_those_of_brute_force(n, size, dim):
    x, codebook = torch.randn(n, dim, dtype=torch.float64), torch.randn(size, dim, dtype=torch.float64)
    distances = cdist(x, codebook)
    assert np.array_equal(train_rqvae.nearest_codes(x, codebook), distances.argmin(1))
    found = distances[np.arange(n), train_rqvae.nearest_codes(x.float(), codebook.float())]
    assert np.allclose(found, distances.min(1), rtol=1e-5)  # in float32 as near as any


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
        assert torch.allclose(rotation @ e, q, atol=1e-12)  # the reference itself: a rotation of e onto q
        assert torch.allclose(rotation.T @ rotation, torch.eye(LATENT, dtype=torch.float64), atol=1e-12)
        assert torch.allclose(x.grad[row], scale * rotation.T @ weight[row], atol=1e-10)


def test_opposite_vectors_are_reflected_onto_the_code():
    x = torch.randn(6, LATENT, dtype=torch.float64, requires_grad=True)
    code = -3 * x.detach()
    (train_rqvae.rotate_to(x, code) * code).sum().backward()
    assert torch.allclose(x.grad, -3 * code)  # lambda is 3, and the gradient changes its sign


def test_straight_through_has_the_identity_as_its_gradient():
    x, weight = torch.randn(20, LATENT, requires_grad=True), torch.randn(20, LATENT)
    (train_rqvae.straight_through(x, torch.randn(20, LATENT)) * weight).sum().backward()
    assert torch.equal(x.grad, weight)


HARD_ROWS = {  # inputs and codes
    "usual": (torch.randn(4, LATENT), torch.randn(4, LATENT)),
    "zero inputs": (torch.zeros(4, LATENT), torch.randn(4, LATENT)),
    "zero codes": (torch.randn(4, LATENT), torch.zeros(4, LATENT)),
    "both zero": (torch.zeros(4, LATENT), torch.zeros(4, LATENT)),
    "equal": (torch.ones(4, LATENT), torch.ones(4, LATENT)),
    "opposite": (torch.ones(4, LATENT), -2 * torch.ones(4, LATENT)),
    "tiny inputs": (1e-20 * torch.ones(4, LATENT), torch.randn(4, LATENT)),
    "large": (1e6 * torch.randn(4, LATENT), 1e-6 * torch.randn(4, LATENT)),
}


@pytest.mark.parametrize("estimator", [train_rqvae.rotate_to, train_rqvae.straight_through])
def test_estimators_return_exactly_the_code_and_a_finite_gradient(estimator):
    for name, (x, code) in HARD_ROWS.items():
        x, code = x.clone().requires_grad_(), code.clone().requires_grad_()
        quantized = estimator(x, code)
        assert torch.equal(quantized, code), name
        quantized.sum().backward()
        assert torch.isfinite(x.grad).all(), name
        assert code.grad is None, name  # the estimator never moves the code itself


# ---------------------------------------------------------------- one level


@pytest.mark.parametrize("kind", [VectorQuantizer, EMAVectorQuantizer])
def test_vector_quantizer_loss_is_the_mean_squared_distance_for_codes_and_for_inputs(kind):
    quantizer, x = kind(SIZE, LATENT, 0.7), torch.randn(50, LATENT)
    output = quantizer(x)
    codebook = quantizer.codebook.detach()
    nearest = codebook[cdist(x.double(), codebook.double()).argmin(1)]
    mean_square = (x - nearest).double().square().mean().item()
    assert output.loss.item() == pytest.approx((1 + 0.7) * mean_square, rel=1e-5)
    assert torch.equal(output.vectors, codebook[output.codes])


def test_the_loss_moves_codes_to_inputs_and_inputs_with_beta_to_codes():
    beta, x = 0.7, torch.randn(50, LATENT, requires_grad=True)
    quantizer = VectorQuantizer(SIZE, LATENT, beta)
    output = quantizer(x)
    away = 2 / x.numel() * (x - quantizer.codebook[output.codes]).detach()
    output.loss.backward()
    assert torch.allclose(
        quantizer.codebook.grad, torch.zeros(SIZE, LATENT).index_add(0, output.codes, -away), atol=1e-6
    )
    assert torch.allclose(x.grad, beta * away, atol=1e-6)
    assert not output.vectors.requires_grad


def test_codebook_gradient_is_bitwise_the_same_on_many_threads():
    quantizer, x = VectorQuantizer(256, 32), torch.randn(1024, 32)
    before, gradients = torch.get_num_threads(), []
    torch.set_num_threads(4)
    for _ in range(30):
        quantizer.zero_grad()
        quantizer(x).loss.backward()
        gradients.append(quantizer.codebook.grad.clone())
    torch.set_num_threads(before)
    assert all(torch.equal(gradients[0], gradient) for gradient in gradients)


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
        assert np.allclose(quantizer.codebook, sums / counts[:, None], rtol=1e-4, atol=1e-5)


def test_ema_codes_without_items_keep_their_place():
    quantizer = EMAVectorQuantizer(4, 2, ema_decay=0.9)
    quantizer.codebook.copy_(torch.tensor([[0.0, 0], [10, 0], [0, 10], [10, 10]]))
    for _ in range(500):
        quantizer(torch.full((8, 2), 1.0))
        quantizer.end_step()
    assert torch.allclose(quantizer.codebook[1:], torch.tensor([[10.0, 0], [0, 10], [10, 10]]), atol=1e-3)
    assert torch.allclose(quantizer.codebook[0], torch.ones(2), atol=1e-3)


def test_ema_counts_items_in_training_steps_alone():
    quantizer, x = EMAVectorQuantizer(SIZE, LATENT), torch.randn(30, LATENT)
    before = quantizer.codebook.clone()
    with torch.no_grad():
        quantizer(x)
    quantizer.eval()(x)
    quantizer.end_step()
    assert torch.allclose(quantizer.codebook, before, atol=1e-6)


# ---------------------------------------------------------------- the residual walk and the search


@pytest.mark.parametrize("changes", QUANTIZERS)
def test_walk_is_the_loop_by_hand(changes):
    model, latents = RQVAE(tiny_config(commitment_weight=0.7, **changes)), torch.randn(100, LATENT)
    quantized = model.quantize(latents)
    left, codes, loss = latents.double().numpy(), [], 0
    for quantizer in model.quantizers:
        codebook = quantizer.codebook.detach().double().numpy()
        codes.append(cdist(left, codebook).argmin(1))
        left = left - codebook[codes[-1]]
        loss += (1 + 0.7) * (left**2).mean()
    assert np.array_equal(quantized.codes, np.stack(codes, axis=1))
    assert np.allclose((latents - quantized.vectors).detach(), left, atol=1e-5)
    assert quantized.loss.item() == pytest.approx(loss, rel=1e-5)
    assert torch.equal(quantized.vectors, model.decode_levels(quantized.codes))
    given_codes = torch.randint(SIZE, (100, LEVELS))
    quantized = model.quantize(latents, given_codes)
    assert torch.equal(quantized.codes, given_codes)
    assert torch.equal(quantized.vectors, model.decode_levels(given_codes))


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
    assert all(quantizer.codebook.grad is None for quantizer in model.quantizers)  # only the losses move codes


def test_search_of_every_id_finds_the_one_that_decodes_nearest(x):
    model = started_model(x, codebook_size=5)
    every = torch.tensor(list(itertools.product(range(5), repeat=LEVELS)))
    nearest = every[cdist(x, model.decode_from_semantic_ids(every)).argmin(1)]
    assert torch.equal(model.encode_to_semantic_ids(x, 5**LEVELS), nearest)
    errors = []
    for width in (1, 4, 5**LEVELS):
        decoded = model.decode_from_semantic_ids(model.encode_to_semantic_ids(x, width))
        errors.append((x - decoded).square().mean().item())
    assert errors[0] > errors[1] > errors[2]


def test_search_of_one_id_is_the_residual_walk(model, x):
    assert torch.equal(model.encode_to_semantic_ids(x, 1), model.quantize(model.encode(model.standardise(x))).codes)


def test_float64_embeddings_get_the_same_ids(model, x):
    assert torch.equal(model.encode_to_semantic_ids(x.double()), model.encode_to_semantic_ids(x))


def test_search_does_not_depend_on_the_other_items(model, x):
    alone = torch.cat([model.encode_to_semantic_ids(row) for row in x[:50].split(1)])
    assert (alone == model.encode_to_semantic_ids(x)[:50]).float().mean() > 0.99  # near ties may turn


def test_losses_are_of_the_codes_that_decode_nearest(model, x):
    inside = model.standardise(x)
    codes, nearest = model(inside, 4)[1], model.quantize(model.encode(inside)).codes
    assert torch.equal(codes, model.search(model.encode(inside), inside, 4))
    assert torch.equal(model(inside, 1)[1], nearest)
    assert not torch.equal(codes, nearest)


# ---------------------------------------------------------------- the model


@pytest.mark.parametrize("beta", [0.0, 2.0])
def test_total_loss_is_the_sum_of_its_terms(x, beta):
    model = started_model(x, commitment_weight=beta).requires_grad_(False)
    inside = model.standardise(x)
    latents = model.encode(inside)
    for width in (1, 4):
        (total, reconstruction, vq), codes = model(inside, width)
        sums = [model.decode_levels(codes[:, :length]) for length in range(1, LEVELS + 1)]
        distances = sum((latents - each).square().mean() for each in sums)
        assert vq.item() == pytest.approx((1 + beta) * distances.item(), rel=1e-4)
        assert total.item() == pytest.approx(reconstruction.item() + vq.item(), rel=1e-5)
        off = model.standardise(model.decode_from_semantic_ids(codes)) - inside
        assert reconstruction.item() == pytest.approx(reconstruction_loss(off), rel=1e-4)


def test_plain_autoencoder_loss_has_no_quantization_in_it(model, x):
    x = model.standardise(x)
    (total, reconstruction, vq), codes = model(x, 0)
    assert codes is None
    assert vq == 0
    assert total == reconstruction
    assert total.item() == pytest.approx(reconstruction_loss(model.decode(model.encode(x)) - x), rel=1e-4)


@pytest.mark.parametrize("changes", QUANTIZERS)
def test_every_parameter_gets_a_gradient(x, changes):
    model = started_model(x, **changes).train()
    before = [quantizer.codebook.detach().clone() for quantizer in model.quantizers]
    model(model.standardise(x), 4)[0][0].backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.abs().sum() > 0, name
    learned = {name for name, p in model.named_parameters() if name.startswith("quantizers") and p.requires_grad}
    if changes["use_ema_vq"]:
        assert not learned
        for quantizer, codebook in zip(model.quantizers, before, strict=True):
            assert torch.equal(quantizer.codebook, codebook)  # not before the end of the step
            quantizer.end_step()
            assert not torch.equal(quantizer.codebook, codebook)
    else:
        assert learned == {f"quantizers.{level}.codebook" for level in range(LEVELS)}


def test_bfloat16_is_for_training_alone(x):
    model = started_model(x).requires_grad_(False)
    exact = model.encode(x)
    model.config.dtype = "bfloat16"
    assert torch.equal(model.eval().encode(x), exact)
    rounded = model.train().encode(x)
    assert rounded.dtype == torch.float32
    assert not torch.equal(rounded, exact)
    assert torch.allclose(rounded, exact, atol=0.1 * exact.std().item())


def test_ids_decode_to_the_sum_of_their_codes(model, x):
    ids = model.encode_to_semantic_ids(x)
    assert ids.shape == (300, LEVELS)
    assert ids.min() >= 0
    assert ids.max() < SIZE
    for length in range(1, LEVELS + 1):
        codes = sum(model.quantizers[level].codebook[ids[:, level]] for level in range(length))
        decoded = model.decode_from_semantic_ids(ids[:, :length])
        assert decoded.shape == x.shape
        assert torch.allclose(model.standardise(decoded), model.decode(codes), atol=1e-5)


def test_ids_and_decoded_embeddings_can_be_trained_on(x):
    model = RQVAE(tiny_config())
    ids = model.encode_to_semantic_ids(x)
    layer = torch.nn.Linear(DIM, 1)
    (layer(model.decode_from_semantic_ids(ids)).sum() + model.decode_levels(ids).sum()).backward()
    assert layer.weight.grad.abs().sum() > 0


def test_a_shift_and_a_scale_of_the_embeddings_go_through(model, x):
    scale, shift = 7.5, torch.randn(DIM)
    moved = RQVAE(model.config)
    moved.load_state_dict(model.state_dict())
    train_rqvae.fit_standardisation(moved, scale * x + shift, torch.arange(300))
    ids = model.encode_to_semantic_ids(x)
    assert (moved.encode_to_semantic_ids(scale * x + shift) == ids).float().mean() > 0.99  # near ties may turn
    decoded = model.decode_from_semantic_ids(ids)
    assert torch.allclose(moved.decode_from_semantic_ids(ids), scale * decoded + shift, atol=1e-4)


def test_standardised_training_rows_have_mean_zero_and_unit_variance():
    model, x, rows = RQVAE(tiny_config()), 3 * clusters() + 5, torch.arange(20, 300)
    x[:20] = 1e6  # held out, and not looked at
    train_rqvae.fit_standardisation(model, x, rows)
    inside = model.standardise(x[rows])
    assert torch.allclose(inside.mean(0), torch.zeros(DIM), atol=1e-4)
    assert inside.square().mean().item() == pytest.approx(1, rel=1e-4)
    train_rqvae.fit_standardisation(model, torch.ones(10, DIM), torch.arange(10))  # no variance to divide by
    assert torch.equal(model.standardise(torch.ones(10, DIM)), torch.zeros(10, DIM))


# ---------------------------------------------------------------- k-means start and resets


def test_latents_that_differ_by_rounding_alone_are_not_blown_up():
    latents = torch.full((50, LATENT), 0.3) + 1e-8 * torch.randn(50, LATENT)
    assert train_rqvae.rescale_latents(RQVAE(tiny_config()), latents).abs().max() < 0.1


@pytest.mark.parametrize("ema", [False, True])
def test_codebooks_start_at_the_k_means_centres_of_each_levels_residuals(ema):
    sizes, latents = [12, 8, 5], torch.randn(200, LATENT)
    model = RQVAE(tiny_config(use_ema_vq=ema, seed=5, codebook_size=sizes))
    train_rqvae.init_codebooks(model, latents, items_per_step=64)
    left = latents.numpy()
    for level, (quantizer, size) in enumerate(zip(model.quantizers, sizes, strict=True)):
        kmeans = KMeans(size, n_init=1, random_state=5 + level).fit(left)
        codebook = quantizer.codebook.detach().numpy()
        assert np.allclose(codebook, kmeans.cluster_centers_, atol=1e-5)
        codes = cdist(left, codebook).argmin(1)
        centres = np.stack([left[codes == code].mean(0) for code in range(size)])
        assert np.allclose(codebook, centres, atol=0.2)  # each code is the middle of its items
        if ema:
            a_step = np.bincount(kmeans.labels_, minlength=size) * 64 / 200  # items of each code in a step of 64
            assert np.allclose(quantizer.ema_counts, a_step, rtol=1e-5)
        left = left - codebook[codes]


def test_start_of_quantizing_keeps_the_function_and_uses_every_code(x):
    model, rows = RQVAE(tiny_config()).requires_grad_(False), torch.arange(300)
    train_rqvae.fit_standardisation(model, x, rows)
    inside = model.standardise(x)
    before = model.encode(inside), model.decode(model.encode(inside))
    train_rqvae.start_quantizing(model, x, rows, items_per_step=64)
    latents = model.encode(inside)
    assert torch.allclose(model.decode(latents), before[1], atol=1e-4)
    assert latents.std().item() == pytest.approx(1, rel=1e-3)
    assert torch.allclose(latents.mean(0), torch.zeros(LATENT), atol=1e-4)
    assert not torch.allclose(latents, before[0], atol=0.1)  # there was something to rescale
    levels = train_rqvae.level_statistics(model.encode_to_semantic_ids(x, 1).numpy(), [SIZE] * LEVELS)
    assert [level["usage"] for level in levels] == [1.0] * LEVELS


@pytest.mark.parametrize("ema", [False, True])
def test_reset_moves_unused_codes_onto_residuals_and_nothing_else(x, ema):
    model = started_model(x, use_ema_vq=ema, codebook_size=[SIZE, SIZE, 5]).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(3):
        train_rqvae.train_step(model, [optimizer], x, torch.arange(300), 4)
    usage = torch.ones(LEVELS, SIZE, dtype=torch.int64)
    usage[0, [1, 4, 6]] = usage[1, 7] = usage[2, 5:] = 0
    before, batch = tensors_of(model), x[50:52]  # fewer items than unused codes
    moments = {name: optimizer.state[parameter] for name, parameter in model.named_parameters()}
    kept = {name: {k: v.clone() for k, v in state.items()} for name, state in moments.items()}

    train_rqvae.reset_codes(model, batch, usage, optimizer)

    assert model.training
    left = model.encode(model.standardise(batch)).detach()
    for level, quantizer in enumerate(model.quantizers):
        unused = usage[level, : len(quantizer.codebook)] == 0
        codebook = quantizer.codebook.detach()
        assert torch.equal(codebook[~unused], before[f"quantizers.{level}.codebook"][~unused])
        for vector in codebook[unused]:
            assert (left == vector).all(1).any()
        if ema:
            assert torch.equal(quantizer.ema_counts[unused], torch.ones(int(unused.sum())))
            assert torch.equal(quantizer.ema_counts[~unused], before[f"quantizers.{level}.ema_counts"][~unused])
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


# ---------------------------------------------------------------- the plan


@pytest.mark.parametrize(
    ("scheduler", "rates"),
    [
        ("cosine", {0: 1.0, 500: 0.505, 1000: 0.01}),
        ("cosine_with_warmup", {0: 0.01, 49: 0.5, 99: 1.0, 100: 1.0, 550: 0.505, 1000: 0.01, 5000: 0.01}),
    ],
)
def test_learning_rate_rises_and_falls_as_the_flags_say(scheduler, rates):
    config = tiny_config(scheduler_type=scheduler, warmup_steps=100, max_lr=1.0, min_lr=0.01)
    assert {step: train_rqvae.learning_rate(step, 1000, config) for step in rates} == pytest.approx(rates)
    short = [train_rqvae.learning_rate(step, total, config) for total in (1, 100) for step in range(total)]
    assert all(0 < rate <= 1 for rate in short)
    assert max(train_rqvae.learning_rate(step, 50, config) for step in range(50)) == 1  # a trial reaches max_lr


def plan_of(n: int, **changes) -> train_rqvae.Plan:
    return train_rqvae.make_plan(n, tiny_config(**changes), CPU)


@pytest.mark.parametrize(("n", "share", "held_out"), [(1000, 0.05, 50), (300, 0.333, 100), (10, 0.99, 9)])
def test_split_is_disjoint_and_complete(n, share, held_out):
    plan = plan_of(n, val_split=share, use_kmeans_init=False)
    assert len(plan.val_rows) == held_out
    assert torch.equal(torch.cat([plan.train_rows, plan.val_rows]).sort().values, torch.arange(n))
    assert torch.equal(plan.val_rows, plan_of(n, val_split=share, use_kmeans_init=False).val_rows)
    assert not torch.equal(plan.val_rows, plan_of(n, val_split=share, seed=1, use_kmeans_init=False).val_rows)
    everything = plan_of(n, val_split=0.001 / n)
    assert torch.equal(everything.train_rows.sort().values, torch.arange(n))  # no row to hold out: all are both
    assert torch.equal(everything.val_rows.sort().values, torch.arange(n))


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
    plan = plan_of(1000, **{"val_split": 0.0} | changes)
    assert (plan.rows_per_step, plan.steps_per_epoch, plan.total_steps) == (rows_per_step, steps_per_epoch, total)
    assert plan.autoencoder_steps == total // 5


def test_plain_autoencoder_takes_a_fifth_of_the_steps_up_to_a_limit():
    assert plan_of(300, max_steps=10_000).autoencoder_steps == train_rqvae.MAX_AUTOENCODER_STEPS
    assert plan_of(300, use_kmeans_init=False).autoencoder_steps == 0
    assert plan_of(300, autoencoder_steps=10, use_kmeans_init=False).autoencoder_steps == 10


@pytest.fixture
def train_idly(x, tmp_path, monkeypatch):
    """Trains on n rows of x in steps that do nothing: their rows and search widths, and the steps of resets."""

    def run(n: int, **changes) -> tuple[Tensor, list[int], list[int]]:
        rows, widths, resets = [], [], []

        def step(model, optimizers, embeddings, batch, search_width):
            rows.append(batch)
            widths.append(search_width)
            codes = torch.zeros(len(batch), LEVELS, dtype=torch.int64) if search_width else None
            return torch.ones(3), codes, torch.ones(())

        monkeypatch.setattr(train_rqvae, "train_step", step)
        monkeypatch.setattr(train_rqvae, "reset_codes", lambda *_: resets.append(len(rows)))
        config = tiny_config(**{"checkpoint_dir": str(tmp_path), "codebook_size": 4, "dtype": "float32"} | changes)
        plan = train_rqvae.make_plan(n, config, CPU)
        assert train_rqvae.train(config, x[:n], plan, {"data": 0, "recipe": {}}, None, None)
        return torch.stack(rows), widths, resets

    return run


def test_steps_go_through_the_training_rows_once_an_epoch_in_an_order_of_its_own(train_idly):
    orders = set()
    for seed in (0, 1, 42):
        rows = train_idly(100, batch_size=30, val_split=0.1, max_steps=15, seed=seed)[0]
        training = plan_of(100, val_split=0.1, seed=seed).train_rows
        for epoch in rows.reshape(5, 90):
            assert torch.equal(epoch.sort().values, training.sort().values)
            orders.add(tuple(epoch.tolist()))
        assert torch.equal(rows, train_idly(100, batch_size=30, val_split=0.1, max_steps=15, seed=seed)[0])
    assert len(orders) == 3 * 5


def test_training_turns_from_autoencoder_to_nearest_codes_to_searched_codes(train_idly):
    flags = {"max_steps": 100, "autoencoder_steps": 10, "steps_per_codebook_reset": 20}
    _, widths, resets = train_idly(300, **flags)
    assert widths == [0] * 10 + [1] * 40 + [train_rqvae.TRAINING_SEARCH_WIDTH] * 50
    assert resets == [30, 50, 70]  # none so late that a code could not settle
    assert not train_idly(300, reset_unused_codes=False, **flags)[2]
    assert train_idly(300, use_kmeans_init=False)[1][0] == 1


# ---------------------------------------------------------------- a step


def mixed_inputs(x: Tensor, mixing: float) -> tuple[Tensor, RQVAE]:
    """Inputs of the encoder, standardised, and the model that gives the scale."""
    model = RQVAE(tiny_config(item_embedding_dim=x.shape[1], input_mixing=mixing))
    train_rqvae.fit_standardisation(model, x, torch.arange(len(x)))
    return train_rqvae.augment(x, model), model


def test_inputs_that_are_not_mixed_are_standardised_embeddings():
    x = clusters(300) + 2
    inside, model = mixed_inputs(x, 0.0)
    assert torch.allclose(inside, model.standardise(x), atol=1e-5)


@pytest.mark.parametrize("mixing", [0.3, 10.0])
def test_mixing_keeps_mean_and_variance(mixing):
    x = clusters(20_000)[torch.randperm(20_000)] + 1
    inside, model = mixed_inputs(x, mixing)
    assert not torch.allclose(inside, model.standardise(x), atol=0.1)
    assert inside.square().mean().item() == pytest.approx(1, rel=0.05)
    assert inside.mean(0).abs().max().item() < 0.1


def test_mixing_stays_on_the_line_between_two_items_of_the_batch():
    x = clusters(30)
    inside, model = mixed_inputs(x, 0.5)
    mixed, centred = inside.double(), model.standardise(x).double()
    other = torch.arange(30).expand(30, 30)[~torch.eye(30, dtype=torch.bool)].reshape(30, 29)
    pairs = torch.stack([centred[:, None].expand(-1, 29, -1), centred[other]], dim=-1)  # (30, 29, D, 2)
    goal = mixed[:, None, :, None].expand(-1, 29, -1, -1)
    weights = torch.linalg.lstsq(pairs, goal).solution  # (30, 29, 2, 1)
    off, best = (pairs @ weights - goal).norm(dim=(2, 3)).min(1)
    assert off.max() < 1e-5
    squares = weights.squeeze(3).square().sum(2)[torch.arange(30), best]
    assert torch.allclose(squares, torch.ones_like(squares), atol=1e-3)  # so the variance is kept


@pytest.mark.parametrize("changes", QUANTIZERS)
def test_small_batches_equal_one_large_batch(x, changes):
    found = []
    for size in (300, 64):  # 64 does not divide 300
        torch.manual_seed(3)
        model = started_model(x, batch_size=size, input_mixing=0.0, gradient_clip_norm=0.5, **changes).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
        terms, generator = [], torch.Generator().manual_seed(0)
        for _ in range(5):
            rows = torch.randperm(300, generator=generator)
            losses, codes, norm = train_rqvae.train_step(model, [optimizer], x, rows, 4)
            terms.append(torch.cat([losses, norm.reshape(1)]))
            assert codes.shape == (300, LEVELS)
        found.append((tensors_of(model), torch.stack(terms)))
    (large, large_terms), (small, small_terms) = found
    assert torch.allclose(large_terms, small_terms, rtol=1e-4)
    for name, tensor in large.items():
        assert torch.allclose(tensor, small[name], rtol=1e-4, atol=2e-5), name


@pytest.mark.parametrize("clip", [0.0, 0.01, 1e9])
def test_step_uses_the_clipped_gradient_and_returns_its_norm_before(x, clip):
    model = started_model(x, gradient_clip_norm=clip)
    before = torch.nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    norm = train_rqvae.train_step(model, [optimizer], x, torch.arange(300), 4)[2].item()
    moved = torch.nn.utils.parameters_to_vector(model.parameters()).detach() - before
    assert norm > 0.01
    assert moved.norm().item() == pytest.approx(min(norm, clip or math.inf), rel=1e-3)
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in model.parameters())


@pytest.mark.parametrize("ema", [False, True])
def test_autoencoder_steps_leave_the_codebooks_alone(x, ema):
    model = RQVAE(tiny_config(use_ema_vq=ema)).train()
    before = tensors_of(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    assert train_rqvae.train_step(model, [optimizer], x, torch.arange(300), 0)[1] is None
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) == (name.startswith("quantizers") or "input" in name), name


@pytest.mark.parametrize(("hidden", "inner"), [([], 0), ([32], 0), ([32, 16], 2), ([32, 16, 12], 4)])
def test_every_parameter_is_in_one_optimizer_and_muon_has_the_inner_matrices(hidden, inner):
    for ema in (False, True):
        model = RQVAE(tiny_config(encoder_hidden_dims=hidden, use_ema_vq=ema))
        adam, *others = train_rqvae.make_optimizers(model, 1e-3)
        muon = [parameter for each in others for group in each.param_groups for parameter in group["params"]]
        optimized = [parameter for group in adam.param_groups for parameter in group["params"]] + muon
        assert sorted(map(id, optimized)) == sorted(map(id, model.parameters()))
        assert len(muon) == inner
        assert all(parameter.ndim == 2 and not {DIM, LATENT} & set(parameter.shape) for parameter in muon)


# ---------------------------------------------------------------- evaluation


def test_statistics_are_those_of_numpy():
    codes = np.random.default_rng(0).integers(6, size=(500, 2)) ** 2 % 8
    sizes = [8, 13]
    for column, size, found in zip(codes.T, sizes, train_rqvae.level_statistics(codes, sizes), strict=True):
        counts = np.bincount(column, minlength=size)
        share = counts[counts > 0] / 500
        assert found == {
            "usage": pytest.approx(len(share) / size),
            "perplexity": pytest.approx(math.exp(-(share * np.log(share)).sum())),
            "items_per_code": counts.tolist(),
        }
    counts = np.unique(codes, axis=0, return_counts=True)[1]
    found = train_rqvae.code_statistics(codes)
    assert found == {"distinct": pytest.approx(len(counts) / 500), "largest_collision": counts.max()}
    assert train_rqvae.level_statistics(np.zeros((10, 1), dtype=np.int64), [4])[0]["perplexity"] == 1
    even = np.array(list(itertools.product(range(4), repeat=2)))
    assert train_rqvae.level_statistics(even, [4, 4])[1]["perplexity"] == pytest.approx(4)
    assert train_rqvae.code_statistics(even) == {"distinct": 1, "largest_collision": 1}


def test_validation_is_over_the_held_out_rows_and_the_whole_catalogue():
    x = clusters(2500)  # more than go through the model at once
    model, rows = started_model(x).train(), torch.arange(1300, 2500)
    with torch.no_grad():
        inside = model.standardise(x[rows])
        losses = model(inside, train_rqvae.TRAINING_SEARCH_WIDTH)[0].tolist()
        codes = model.encode_to_semantic_ids(x, train_rqvae.TRAINING_SEARCH_WIDTH)
        residuals = model.encode(model.standardise(x)) - model.decode_levels(codes)
    ids = train_rqvae.code_statistics(codes.numpy())
    found = train_rqvae.validate(model, x, rows)
    assert model.training
    names = ("total_loss", "reconstruction_loss", "vq_loss")
    assert [found[f"val/{name}"] for name in names] == pytest.approx(losses, rel=1e-4)
    for i, level in enumerate(train_rqvae.level_statistics(codes.numpy(), [SIZE] * LEVELS)):
        assert found[f"catalogue/usage_{i}"] == level["usage"]
        assert found[f"catalogue/perplexity_{i}"] == pytest.approx(level["perplexity"], rel=0.01)
    assert found["catalogue/distinct"] == pytest.approx(ids["distinct"], abs=0.01)
    assert found["catalogue/residual_norm"] == pytest.approx(residuals.norm(dim=1).mean().item(), rel=1e-4)


# ---------------------------------------------------------------- quality of the IDs


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def test_unexplained_variance_is_that_of_numpy(model, x):
    x = x + 0.2
    decoded = model.decode_from_semantic_ids(model.encode_to_semantic_ids(x))
    real, guess = x.double().numpy(), decoded.double().numpy()
    unexplained = ((real - guess) ** 2).sum() / ((real - real.mean(0)) ** 2).sum()
    assert train_rqvae.unexplained_variance(x, decoded) == pytest.approx(unexplained, rel=1e-4)
    assert train_rqvae.unexplained_variance(1e-9 * x, 1e-9 * decoded) == pytest.approx(unexplained, rel=1e-4)
    alike = torch.full((9, 4), 0.3)
    assert train_rqvae.unexplained_variance(alike, alike) == 0


def test_neighbour_recall_is_that_of_brute_force():
    x = torch.randn(200, 6)
    decoded = x + torch.randn(200, 6)
    queries = torch.arange(200)  # more than are compared at once
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
    assert train_rqvae.neighbour_recall(x, 3 * x, queries) == 1  # cosine knows no length
    few = torch.arange(4)
    assert train_rqvae.neighbour_recall(x[few], -x[few], few) == 1  # all the others are among the nearest ten
    assert train_rqvae.neighbour_recall(x[:1], x[:1], few[:1]) == 1


def test_twins_do_not_lower_neighbour_recall():
    x = torch.randn(20, 16).repeat_interleave(30, dim=0)[torch.randperm(600)]  # 20 texts, each of 30 items
    queries = torch.arange(600)
    assert train_rqvae.neighbour_recall(x, x + 1e-3 * torch.randn(600, 16), queries) == 1  # any ten of the 29 twins
    assert train_rqvae.neighbour_recall(x, x.clone(), queries) == 1
    assert train_rqvae.neighbour_recall(x, torch.randn(600, 16), queries) < 0.15  # others are not found by chance


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
        found = train_rqvae.coherence(torch.from_numpy(x).float(), codes, level)
        assert found == pytest.approx(expected, abs=1e-5)
    assert train_rqvae.coherence(torch.randn(5, 3), np.arange(5).reshape(5, 1), 1) is None  # nothing shared


def test_quality_is_of_these_ids(model, x, monkeypatch):
    encoded = model.encode_to_semantic_ids(x).numpy()
    written = encoded.copy()
    written[:30, -1] = (written[:30, -1] + 1) % SIZE
    quality = train_rqvae.measure_quality(model, x, encoded, written)
    json.dumps(quality, allow_nan=False)
    assert quality["items"] == quality["sampled_items"] == len(x)
    assert quality["displaced"] == pytest.approx(30 / len(x))
    for when, codes in (("as_encoded", encoded), ("as_written", written)):
        decoded = model.decode_from_semantic_ids(torch.from_numpy(codes))
        assert quality[when] == train_rqvae.code_statistics(codes) | {
            "unexplained_variance": pytest.approx(train_rqvae.unexplained_variance(x, decoded)),
            "recall@10": pytest.approx(train_rqvae.neighbour_recall(x, decoded, torch.arange(len(x))), abs=1e-3),
        }
    levels = train_rqvae.level_statistics(encoded, [SIZE] * LEVELS)
    for length, (found, level) in enumerate(zip(quality["levels"], levels, strict=True), start=1):
        decoded = model.decode_from_semantic_ids(torch.from_numpy(encoded[:, :length]))
        assert found == level | {
            "unexplained_variance": pytest.approx(train_rqvae.unexplained_variance(x, decoded)),
            "coherence": pytest.approx(train_rqvae.coherence(x, encoded, length)),
        }

    monkeypatch.setattr(train_rqvae, "QUALITY_ROWS", 50)
    sampled = train_rqvae.measure_quality(model, x, encoded, written)
    assert sampled["sampled_items"] == 50
    assert sampled["as_encoded"]["distinct"] == quality["as_encoded"]["distinct"]  # counts are of all items
    figures = [each["as_encoded"]["unexplained_variance"] for each in (sampled, quality)]
    assert figures[0] != figures[1]
    assert figures[0] == pytest.approx(figures[1], rel=0.3)


def test_bar_chart_falls_from_the_commonest_code_to_the_rarest():
    assert train_rqvae.bar_chart(pl.Series([0, 8, 4, 1])) == "8 █▄▁  0"
    equal = train_rqvae.bar_chart(pl.Series([5] * 300))
    assert set(equal[2:-2]) == {"█"}
    assert len(equal) < 30  # codes share a bar


# ---------------------------------------------------------------- distinct IDs


def is_distinct(codes: np.ndarray) -> bool:
    return len(np.unique(codes, axis=0)) == len(codes)


def example(n: int, sizes: list[int], seed: int) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """Latents, their codes as a model would give them, and codebooks that get finer."""
    generator = np.random.default_rng(seed)
    latents = generator.normal(size=(n, 4))
    codebooks = [generator.normal(size=(size, 4)) / 2.0**level for level, size in enumerate(sizes)]
    left, codes = latents, []
    for codebook in codebooks:
        codes.append(cdist(left, codebook).argmin(1))
        left = left - codebook[codes[-1]]
    return latents, np.stack(codes, axis=1), codebooks


def assigned(latents: np.ndarray, codes: np.ndarray, codebooks: list[np.ndarray], occupied=()) -> np.ndarray:
    """By a model that decodes latents to themselves; none of the occupied IDs."""
    dim = latents.shape[1]
    levels = {"codebook_quantization_levels": len(codebooks), "codebook_size": [len(book) for book in codebooks]}
    config = RQVAEConfig(item_embedding_dim=dim, encoder_hidden_dims=[], codebook_embedding_dim=dim, **levels)
    model = RQVAE(config).requires_grad_(False)
    model.decoder.load_state_dict({"0.weight": torch.eye(dim), "0.bias": torch.zeros(dim)})
    for quantizer, book in zip(model.quantizers, codebooks, strict=True):
        quantizer.codebook.copy_(torch.from_numpy(book))
    occupied = np.array(occupied, dtype=np.int64).reshape(-1, codes.shape[1])
    return train_rqvae.make_distinct(model, torch.from_numpy(latents).float(), latents, codes, "assign", occupied)


@st.composite
def catalogues(draw):
    sizes = draw(st.lists(st.integers(2, 4), min_size=1, max_size=3))
    n = draw(st.integers(1, math.prod(sizes)))
    generator = np.random.default_rng(draw(st.integers(0, 10_000)))
    codes = generator.integers(np.minimum(draw(st.integers(1, 4)), sizes), size=(n, len(sizes)))  # few: they collide
    latents = generator.normal(size=(draw(st.sampled_from([1, n])), 3))
    return (
        np.resize(latents, (n, 3)),
        codes,
        [generator.normal(size=(size, 3)) for size in sizes],
    )  # perhaps equal latents


@settings(max_examples=150)
@given(catalogues(), st.sampled_from([0.0, 0.5, 1.0]))
def test_ids_are_distinct_and_none_is_occupied(catalogue, share):
    latents, codes, codebooks = catalogue
    sizes = [len(codebook) for codebook in codebooks]
    every = np.array(list(itertools.product(*map(range, sizes))))
    spare = len(every) - len(codes)  # at a share of 1, no ID is left over
    occupied = np.random.default_rng(len(codes)).permutation(every)[: round(share * spare)]
    given_codes = codes.copy()
    found = assigned(latents, codes, codebooks, occupied)
    assert np.array_equal(codes, given_codes)  # the input stays
    assert found.shape == codes.shape
    assert found.min() >= 0
    assert (found < sizes).all()
    assert is_distinct(np.concatenate([found, occupied]))
    if is_distinct(np.concatenate([codes, occupied])):
        assert np.array_equal(found, codes)


@pytest.mark.parametrize("seed", range(3))
def test_last_codes_have_the_least_cost_of_all_that_are_free(seed):
    latents, codes, codebooks = example(7, [3, 5], seed)
    codes[:, 0] = [0, 0, 0, 0, 1, 1, 2]  # each first code has room for its items
    codes[:, 1] = [3, 3, 1, 1, 2, 2, 4]
    found = assigned(latents, codes, codebooks, [[1, 2], [1, 4], [3, 0]])
    assert np.array_equal(found[:, 0], codes[:, 0])
    assert np.array_equal(found[6], codes[6])  # alone with its ID: stays, though another code may be nearer
    for first, free in ((0, [0, 1, 2, 3, 4]), (1, [0, 1, 3])):
        rows = np.flatnonzero(codes[:, 0] == first)
        items = range(len(rows))
        cost = cdist(latents[rows] - codebooks[0][first], codebooks[1]) ** 2
        least = min(sum(cost[i, way[i]] for i in items) for way in itertools.permutations(free, len(rows)))
        assert sum(cost[i, found[rows[i], 1]] for i in items) == pytest.approx(least)


def test_prefixes_without_collisions_stay_bit_for_bit():
    latents, codes, codebooks = example(60, [8, 8, 8], seed=1)
    ids = Counter(map(tuple, codes.tolist()))
    crowded = {prefix[:2] for prefix, count in ids.items() if count > 1}
    kept = np.array([tuple(row) not in crowded for row in codes[:, :2].tolist()])
    found = assigned(latents, codes, codebooks)
    assert 0 < kept.sum() < 60
    assert np.array_equal(found[kept], codes[kept])
    assert not np.array_equal(found, codes)


def test_a_prefix_with_more_items_than_codes_gives_away_only_the_surplus():
    latents, codes, codebooks = example(12, [4, 4], seed=2)
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
    latents, codes, codebooks = example(200, [12, 9, 4], seed=3)
    found = assigned(latents, codes, codebooks)
    order = np.random.default_rng(0).permutation(200)
    again = assigned(latents[order], codes[order], codebooks)
    assert np.array_equal(again, found[order])  # no two of these latents are equal


@pytest.mark.parametrize("levels", [1, 3])
def test_last_codes_are_those_that_decode_with_the_least_error(x, levels):
    n = 7 if levels == 1 else 60
    model = started_model(x, codebook_quantization_levels=levels).requires_grad_(False)
    latents = model.encode(model.standardise(x[:n])).numpy()
    codes = np.zeros((n, levels), dtype=np.int64)
    codes[:, -1] = 3  # the same for all items of a prefix
    if levels > 1:
        codes[:, -2] = np.arange(n) % SIZE  # each prefix has room for its items
    found = train_rqvae.make_distinct(model, x[:n], latents, codes, "assign", codes[:0])
    assert np.array_equal(found[:, :-1], codes[:, :-1])
    for prefix in np.unique(codes[:, :-1], axis=0):
        rows = np.flatnonzero((codes[:, :-1] == prefix).all(1))
        every = np.column_stack([np.tile(prefix, (SIZE, 1)), np.arange(SIZE)])
        cost = cdist(x[rows], model.decode_from_semantic_ids(torch.from_numpy(every))) ** 2
        least = cost[linear_sum_assignment(cost)].sum()
        assert cost[np.arange(len(rows)), found[rows, -1]].sum() == pytest.approx(least, rel=1e-5)


@given(catalogues())
def test_suffix_is_the_rank_among_equals(catalogue):
    codes, seen = catalogue[1], Counter()
    found = train_rqvae.add_suffix(codes, np.empty((0, codes.shape[1] + 1), dtype=np.int64))
    assert np.array_equal(found[:, :-1], codes)
    for row, suffix in zip(codes.tolist(), found[:, -1].tolist(), strict=True):
        assert suffix == seen[tuple(row)]
        seen[tuple(row)] += 1


def test_suffix_goes_on_from_the_occupied_ids():
    codes = np.array([[1, 2], [0, 0], [1, 2], [3, 3]])
    occupied = np.array([[1, 2, 5], [1, 2, 0], [0, 0, 0], [2, 2, 9]])
    assert train_rqvae.add_suffix(codes, occupied)[:, 2].tolist() == [6, 1, 7, 0]


# ---------------------------------------------------------------- files


def write_catalogue(path, x: Tensor, kind=None, names=None, **columns) -> None:
    kind = kind or pl.List(pl.Float32)
    names = names or [f"B{row:04}" for row in range(len(x))]
    table = pl.DataFrame({"parent_asin": names, "embedding": pl.Series(x.tolist(), dtype=kind)} | columns)
    table.write_parquet(path)


@pytest.mark.parametrize("kind", [pl.List(pl.Float32), pl.List(pl.Float64), pl.Array(pl.Float32, DIM)], ids=str)
def test_dataset_is_the_file_in_its_order(x, tmp_path, kind):
    names = [f"B{place:04}" for place in np.random.default_rng(0).permutation(20)]
    texts = {"title": [f"title {row}" for row in range(19)] + [None], "item_context": ["text"] * 20}
    write_catalogue(tmp_path / "a.parquet", x[:20], kind, names, **texts)
    dataset = EmbeddingDataset(tmp_path / "a.parquet")
    assert len(dataset) == 20
    assert dataset.parent_asin.to_list() == names
    assert dataset.embeddings.dtype == torch.float32
    assert torch.equal(dataset.embeddings, x[:20])
    assert dataset.labels.to_list() == [f"title {row}" for row in range(19)] + ["text"]
    first = EmbeddingDataset(tmp_path / "a.parquet", num_rows=7)
    assert first.parent_asin.to_list() == names[:7]
    assert torch.equal(first.embeddings, x[:7])


def test_dataset_is_read_whole_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(train_rqvae, "ROWS_READ", 7)
    x = clusters(50)
    write_catalogue(tmp_path / "a.parquet", x)
    assert torch.equal(EmbeddingDataset(tmp_path / "a.parquet").embeddings, x)
    assert torch.equal(EmbeddingDataset(tmp_path / "a.parquet", num_rows=13).embeddings, x[:13])


def test_checksum_tells_other_names_vectors_and_orders_apart(x, tmp_path):
    names, other = [f"B{row:04}" for row in range(300)], x.clone()
    other[171, 3] += 1e-6
    written = [(x, names), (other, names), (x[:-1], names[:-1]), (x, names[::-1]), (x, [*names[:-1], "C"])]
    found = []
    for vectors, asins in [*written, (x.flip(0), names[::-1])]:
        write_catalogue(tmp_path / "a.parquet", vectors, names=asins)
        found.append(EmbeddingDataset(tmp_path / "a.parquet").fingerprint["data"])
    assert len(set(found)) == len(written) + 1


@pytest.mark.parametrize(
    ("columns", "label"),
    [
        ({"title": [" \n"] * 5, "item_context": ["text"] * 5}, "text"),
        ({"title": [7] * 5}, "B0000"),
        ({"title": [["a", "b"]] * 5}, "B0000"),
    ],
    ids=["a blank title", "a number", "a list"],
)
def test_labels_are_the_best_text_there_is(x, tmp_path, columns, label):
    write_catalogue(tmp_path / "a.parquet", x[:5], **columns)
    assert EmbeddingDataset(tmp_path / "a.parquet").labels[0] == label


def saved(path, model: RQVAE) -> None:
    plan = train_rqvae.make_plan(300, model.config, CPU)
    state = train_rqvae.TrainingState(model, plan, {"data": 0, "recipe": {}}, run=None)
    state.metrics = {"val/total_loss": 0.5}
    state.save(path)


@pytest.mark.parametrize("changes", QUANTIZERS)
def test_a_saved_model_comes_back_bit_for_bit(x, tmp_path, changes):
    model = started_model(x, codebook_size=[SIZE, 6, 4], **changes)
    saved(tmp_path / "a.pth", model)
    loaded = train_rqvae.load_model(tmp_path / "a.pth")
    assert not loaded.training
    assert loaded.config == model.config
    assert loaded.metrics == {"val/total_loss": 0.5, "step": 0}
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(loaded.encode_to_semantic_ids(x), model.eval().encode_to_semantic_ids(x))


def test_a_file_half_written_never_takes_the_place_of_a_whole_one(tmp_path, full_disk, capsys):
    path = tmp_path / "a.bin"
    path.write_bytes(b"whole")
    with pytest.raises(SystemExit) as exit_info:
        full_disk(train_rqvae.atomic_write, {path: b"half" * 1000})
    assert exit_info.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {path}: cannot be written")
    assert path.read_bytes() == b"whole"
    assert list(tmp_path.iterdir()) == [path]
    train_rqvae.atomic_write({path: b"new"})
    assert path.read_bytes() == b"new"
