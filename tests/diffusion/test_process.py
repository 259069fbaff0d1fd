"""The process against formulas written anew in float64 with Python's numbers, one step at a time."""

import math

import pytest
import torch

from ipt_fast.diffusion import GaussianDiffusion, Schedule

STEPS = (0, 1, 500, 999)


def naive(step):
    """β, ᾱ and ᾱ of the step before, by a loop over Ho et al.'s linear schedule."""
    kept = 1.0
    for number in range(step + 1):
        beta, before = 1e-4 + (0.02 - 1e-4) * number / 999, kept
        kept *= 1 - beta
    return beta, kept, before


def images(seed, channels=2):
    return torch.randn(1, channels, 3, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(actual, expected):
    torch.testing.assert_close(actual.double(), expected.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("step", STEPS)
def test_noise_and_posterior(step):
    beta, kept, before = naive(step)
    diffusion, index = GaussianDiffusion(), torch.tensor([step])
    x_0, noise = images(0), images(1)
    x_t = math.sqrt(kept) * x_0 + math.sqrt(1 - kept) * noise
    close(diffusion.q_sample(x_0, index, noise), x_t)
    # x_0 of noisy images is lost in float32's rounding as 1 / √ᾱ grows to 157.
    assert (diffusion.predict_x_0(x_t, index, noise) - x_0).abs().max() < 1e-6 / math.sqrt(kept)
    # Bayes' rule on two normal distributions, with precisions; of the first step x_0 itself is left.
    if step:
        precision = (1 - beta) / beta + 1 / (1 - before)
        mean = (math.sqrt(1 - beta) / beta * x_t + math.sqrt(before) / (1 - before) * x_0) / precision
        close(diffusion.tables["posterior_log_variance"][step].exp(), torch.tensor(1 / precision))
    else:
        mean = x_0
    close(diffusion.posterior_mean(x_0, x_t, index), mean)


def test_the_posterior_variance_of_the_first_step_is_that_of_the_second():
    log_variance = GaussianDiffusion().tables["posterior_log_variance"]
    assert log_variance.isfinite().all() and log_variance[0] == log_variance[1]


@pytest.mark.parametrize("step", STEPS)
def test_learned_variance_lies_between_its_bounds(step):
    beta, kept, before = naive(max(step, 1))
    small = math.log(beta * (1 - before) / (1 - kept))
    large = math.log(naive(step)[0])
    diffusion, index = GaussianDiffusion(), torch.tensor([step])
    for v, expected in ((-1, small), (1, large), (0, (small + large) / 2), (3, 2 * large - small)):
        close(diffusion.log_variance(torch.full((1, 2, 3, 3), float(v)), index), torch.full((1, 2, 3, 3), expected))


def naive_bound(predicted, v, x_0, x_t, step):
    """L_{t-1} by the KL of torch.distributions, or L_0 by the normal distribution's CDF; in bits, float64."""
    beta, kept, before = naive(step)
    x_0_hat = (x_t - math.sqrt(1 - kept) * predicted) / math.sqrt(kept)
    first, second = math.sqrt(before) * beta / (1 - kept), math.sqrt(1 - beta) * (1 - before) / (1 - kept)
    _, kept_1, before_1 = naive(max(step, 1))
    small = naive(max(step, 1))[0] * (1 - before_1) / (1 - kept_1)
    share = (v + 1) / 2
    deviation = (share * math.log(beta) + (1 - share) * math.log(small)).exp().sqrt()
    learned = torch.distributions.Normal(first * x_0_hat + second * x_t, deviation)
    if step:
        true = torch.distributions.Normal(first * x_0 + second * x_t, math.sqrt(small))
        return torch.distributions.kl_divergence(true, learned).mean() / math.log(2)
    upper = torch.where(x_0 > 0.999, torch.ones(()), learned.cdf(x_0 + 1 / 255))
    lower = torch.where(x_0 < -0.999, torch.zeros(()), learned.cdf(x_0 - 1 / 255))
    return -(upper - lower).log2().mean()


@pytest.mark.parametrize("step", STEPS)
def test_hybrid_loss(step):
    x_0 = images(2).mul(0.7).clamp(-1, 1)
    x_0[0, 0, 0, 0], x_0[0, 0, 0, 1] = -1, 1  # the outer bins
    noise, kept = images(3), naive(step)[1]
    x_t = math.sqrt(kept) * x_0 + math.sqrt(1 - kept) * noise
    predicted = (noise + 0.1 * images(4)).requires_grad_()
    v = images(5).tanh().requires_grad_()
    expected = (predicted - noise).square().mean() + naive_bound(predicted.detach(), v, x_0, x_t, step)
    output = torch.cat([predicted, v], 1).float()
    loss = GaussianDiffusion().hybrid_loss(output, x_0, x_t, noise, torch.tensor([step]))
    torch.testing.assert_close(loss.double(), expected[None], rtol=2e-4, atol=1e-6)
    # The bound teaches the variance alone.
    of_noise, of_v = torch.autograd.grad(loss.sum(), (predicted, v))
    expected_of_noise, expected_of_v = torch.autograd.grad(expected, (predicted, v))
    torch.testing.assert_close(of_noise, expected_of_noise, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(of_v, expected_of_v, rtol=2e-3, atol=1e-6)


def test_a_model_without_a_learned_variance_has_the_simple_loss():
    diffusion, index = GaussianDiffusion(), torch.tensor([7])
    loss = diffusion.hybrid_loss(images(1).float(), images(0), images(2), images(3), index)
    close(loss, (images(1) - images(3)).square().mean()[None])


def test_loss_is_of_each_image_in_float32():
    diffusion, index = GaussianDiffusion(), torch.tensor([0, 3, 999])
    x_0, noise = (torch.randn(3, 2, 4, 4) for _ in range(2))
    x_t, output = diffusion.q_sample(x_0, index, noise), torch.randn(3, 4, 4, 4)
    losses = diffusion.hybrid_loss(output, x_0, x_t, noise, index)
    assert losses.shape == (3,) and losses.dtype == torch.float32
    for i in range(3):
        own = slice(i, i + 1)
        alone = diffusion.hybrid_loss(output[own], x_0[own], x_t[own], noise[own], index[own])
        torch.testing.assert_close(alone, losses[own])
    half = diffusion.hybrid_loss(output.bfloat16(), x_0, x_t, noise, index)
    assert half.dtype == torch.float32


def test_loss_and_gradients_are_finite_far_from_the_truth():
    diffusion = GaussianDiffusion()
    index = torch.tensor([0, 1, 999])
    x_0 = torch.stack([torch.full((1, 2, 2), value) for value in (-1.0, 0.2, 1.0)])
    output = torch.full((3, 2, 2, 2), 50.0)
    output[:, 1] = -1
    output.requires_grad_()
    loss = diffusion.hybrid_loss(output, x_0, x_0, torch.zeros_like(x_0), index).sum()
    loss.backward()
    assert loss.isfinite() and output.grad.isfinite().all()


def test_wrong_number_of_channels():
    zeros = torch.zeros(1, 4, 2, 2)
    with pytest.raises(ValueError, match="output of the model must have 4 or 8 channels; got 6"):
        GaussianDiffusion().hybrid_loss(torch.zeros(1, 6, 2, 2), zeros, zeros, zeros, torch.tensor([0]))


ZEROS, TWO = torch.zeros(2, 4, 3, 3), torch.tensor([0, 999])


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (torch.tensor([0, 1000]), "step must be 0 to 999; got 1000"),
        (torch.tensor([-1, 0]), "step must be 0 to 999; got -1"),
        (torch.tensor([0.0, 1.0]), "step must be an int64 or int32 tensor; got torch.float32"),
        (torch.tensor([True, False]), "step must be an int64 or int32 tensor; got torch.bool"),
        (3, "step must be an int64 or int32 tensor; got int"),
        (torch.tensor([3]), r"step must be \(2,\), one for each image; got \(1,\)"),
        (torch.tensor(3), r"step must be \(2,\), one for each image; got \(\)"),
        (torch.zeros(2, dtype=torch.int64, device="meta"), "step must be on cpu as .*; got meta"),
    ],
)
def test_wrong_step(step, message):
    diffusion = GaussianDiffusion()
    for call in (
        lambda: diffusion.q_sample(ZEROS, step, ZEROS),
        lambda: diffusion.predict_x_0(ZEROS, step, ZEROS),
        lambda: diffusion.posterior_mean(ZEROS, ZEROS, step),
        lambda: diffusion.log_variance(ZEROS, step),
        lambda: diffusion.hybrid_loss(ZEROS, ZEROS, ZEROS, ZEROS, step),
        lambda: diffusion.variational_bound(ZEROS, ZEROS, ZEROS, ZEROS, step),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            call()


def test_steps_are_those_of_a_respaced_schedule_and_int32_is_taken():
    diffusion = GaussianDiffusion(Schedule.linear().respaced(10))
    close(diffusion.q_sample(ZEROS, torch.tensor([0, 9], dtype=torch.int32), ZEROS), ZEROS)
    with pytest.raises(ValueError, match="step must be 0 to 9; got 10"):
        diffusion.q_sample(ZEROS, torch.tensor([0, 10]), ZEROS)


def test_values_that_would_make_an_accelerator_wait_are_not_read():
    step = torch.empty(2, dtype=torch.int64, device="meta")  # has no values that could be read
    GaussianDiffusion().q_sample(ZEROS.to("meta"), step, ZEROS.to("meta"))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda d: d.q_sample(ZEROS, TWO, ZEROS[:1]), r"noise must be \(2, 4, 3, 3\) as x_0; got \(1, 4, 3, 3\)"),
        (lambda d: d.q_sample(ZEROS.long(), TWO, ZEROS), "x_0 must be a floating-point tensor; got torch.int64"),
        (lambda d: d.q_sample(ZEROS, TWO, None), "noise must be a floating-point tensor; got NoneType"),
        (lambda d: d.q_sample(ZEROS[0], TWO, ZEROS[0]), r"x_0 must be \(B, C, H, W\); got \(4, 3, 3\)"),
        (lambda d: d.q_sample(ZEROS, TWO, ZEROS.to("meta")), "noise must be on cpu as x_0; got meta"),
        (
            lambda d: d.hybrid_loss(torch.zeros(2, 8, 1, 1), ZEROS, ZEROS, ZEROS, TWO),
            r"output must be \(2, 4, 3, 3\) as x_t; got \(2, 4, 1, 1\)",
        ),
        (lambda d: d.hybrid_loss(None, ZEROS, ZEROS, ZEROS, TWO), "output of the model must be a tensor; got NoneType"),
        (lambda d: GaussianDiffusion(1000), "schedule must be a Schedule; got int"),
    ],
)
def test_wrong_images(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call(GaussianDiffusion())


# -- schedules ------------------------------------------------------------------------------------------------------


def test_respaced_steps_keep_what_is_left_of_the_image():
    full = Schedule.linear()
    short = full.respaced(250)
    assert len(short) == 250
    assert short.timesteps[0] == 0 and short.timesteps[-1] == 999
    # Evenly spaced real numbers, rounded as Python does.
    assert short.timesteps.tolist() == [round(number * 999 / 249) for number in range(250)]
    close(short.alphas_cumprod, full.alphas_cumprod[short.timesteps])
    twice = short.respaced(10)
    close(twice.alphas_cumprod, full.alphas_cumprod[twice.timesteps])


def test_all_steps_stay_as_they_are():
    full = Schedule.linear()
    same = full.respaced(1000)
    assert torch.equal(same.timesteps, full.timesteps)
    torch.testing.assert_close(same.betas, full.betas, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        (1, "steps must be from 2 to the 1000 of the schedule; got 1"),
        (1001, "steps must be from 2 to the 1000 of the schedule; got 1001"),
        (2.5, "steps must be an integer; got 2.5"),
        (True, "steps must be an integer; got True"),
    ],
)
def test_wrong_steps(steps, message):
    with pytest.raises((TypeError, ValueError), match=message):
        Schedule.linear().respaced(steps)


BETAS, TIMES = torch.full((3,), 0.1, dtype=torch.float64), torch.arange(3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Schedule.linear(0), "steps must be at least 2; got 0"),
        (lambda: Schedule.linear(1.5), "steps must be an integer; got 1.5"),
        (lambda: Schedule.linear(10, 0.0), r"first must be in \(0, 1\); got 0.0"),
        (lambda: Schedule.linear(10, last=1), r"last must be in \(0, 1\); got 1"),
        (lambda: Schedule.linear(10, last="1"), "last must be a number; got '1'"),
        (lambda: Schedule(BETAS * 10, TIMES), r"betas must be in \(0, 1\); got 1.0"),
        (lambda: Schedule(BETAS * math.nan, TIMES), r"betas must be in \(0, 1\); got nan"),
        (lambda: Schedule(BETAS[:2], TIMES), "timesteps must be 2 as betas; got 3"),
        (lambda: Schedule(BETAS[:1], TIMES[:1]), "betas must be of at least 2 steps; got 1"),
        (lambda: Schedule(BETAS.float(), TIMES), "betas must be a tensor of torch.float64; got torch.float32"),
        (lambda: Schedule([0.1, 0.2], TIMES), "betas must be a tensor of torch.float64; got list"),
        (lambda: Schedule(BETAS[None], TIMES), r"betas must be \(S,\); got \(1, 3\)"),
        (lambda: Schedule(BETAS, TIMES.flip(0)), "timesteps must be ascending; got 1 after 2"),
        (lambda: Schedule.linear().at(torch.tensor([5, 1000])), "steps must be from 0 to 999; got 1000"),
        (lambda: Schedule.linear().at(torch.tensor([-1, 5])), "steps must be from 0 to 999; got -1"),
        (lambda: Schedule.linear().at(torch.tensor([5, 5])), "steps must be ascending; got 5 after 5"),
        (lambda: Schedule.linear().at(torch.tensor([5])), "steps must be at least 2; got 1"),
    ],
)
def test_wrong_schedules(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make()
