"""Keras' distiller with our loss: its numbers where it clips nothing, the exact ones elsewhere."""

import importlib
import os

import pytest
import torch
from conftest import problem, random_like

os.environ.setdefault("KERAS_BACKEND", "torch")  # read when keras is imported
keras = pytest.importorskip("keras", reason="keras is not installed")
if keras.backend.backend() != "torch":
    pytest.skip("keras is on another backend", allow_module_level=True)

from kdkernels import kd_loss  # noqa: E402
from kdkernels.integrations.keras import LogitsDistillation  # noqa: E402

B, V = 6, 10
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # Keras'
    pytest.mark.filterwarnings("ignore:`compile... was not called as part of model loading"),
]


def theirs(temperature):
    """The KL of Keras, which its default, the name "kl_divergence", is not."""
    loss = keras.losses.KLDivergence()
    return keras.distillation.LogitsDistillation(temperature=temperature, loss=loss)


def step(loss, student, teacher, upstream):
    student = student.detach().requires_grad_()
    value = loss.compute_loss(teacher, student)
    (grad,) = torch.autograd.grad(value, student, upstream)
    return value.detach(), grad


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_values_and_gradients_are_theirs_where_nothing_is_clipped(temperature):
    student, teacher, _ = problem(B, V, spread=1.0)
    upstream = random_like(student.sum())
    wanted, wanted_grad = step(theirs(temperature), student, teacher, upstream)
    value, grad = step(LogitsDistillation(temperature), student, teacher, upstream)
    torch.testing.assert_close(value, wanted)
    assert (grad - wanted_grad).abs().amax() < 1e-5 * wanted_grad.abs().amax()


def test_a_large_vocabulary_is_clipped_there_and_exact_here():
    student, teacher, _ = problem(4, 50_257)  # GPT-2's, logits of standard deviation 3
    upstream = random_like(student.sum())
    inputs = student.double(), teacher.double(), upstream.double()
    wanted, wanted_grad = step(LogitsDistillation(1.0), *inputs)
    value, grad = step(LogitsDistillation(1.0), student, teacher, upstream)
    assert abs(value / wanted - 1) < 1e-6
    assert (grad - wanted_grad).norm() < 1e-6 * wanted_grad.norm()
    value, grad = step(theirs(1.0), student, teacher, upstream)
    assert -0.12 < value / wanted - 1 < -0.08  # a tenth is missing
    assert 0.4 < (grad - wanted_grad).norm() / wanted_grad.norm() < 0.6
    clipped = student.softmax(-1) < 1e-7
    assert 0.3 < clipped.double().mean() < 0.5


def test_their_default_takes_logits_for_probabilities():
    student, teacher, _ = problem(B, V, spread=1.0)
    default = keras.distillation.LogitsDistillation(temperature=3.0)
    found = default.compute_loss(teacher, student)
    p, q = (x.div(3.0).clamp(1e-7, 1) for x in (teacher, student))  # without a softmax
    torch.testing.assert_close(found, (p * (p / q).log()).sum(-1).mean())
    value = LogitsDistillation().compute_loss(teacher, student)  # T = 3 by default, too
    torch.testing.assert_close(value, theirs(3.0).compute_loss(teacher, student))
    assert found > 5 * value
    # A shift of all logits changes no prediction: no loss either.
    assert default.compute_loss(teacher + 2, student) > 2 * found
    torch.testing.assert_close(LogitsDistillation().compute_loss(teacher + 2, student), value)


def test_other_divergences_have_the_t_squared_too():
    student, teacher, _ = problem(B, V)
    loss = LogitsDistillation(temperature=2.0, divergence="reverse_kl")
    wanted = kd_loss(student, teacher, temperature=2.0, divergence="reverse_kl")
    assert loss.compute_loss(teacher, student) == wanted
    with pytest.raises(ValueError, match="divergence"):
        LogitsDistillation(divergence="categorical_crossentropy")


def test_losses_of_several_outputs_add_up():
    student, teacher, _ = problem(2, B, V)
    loss = LogitsDistillation(temperature=2.0)
    wanted = sum(loss.compute_loss(t, s) for s, t in zip(student, teacher, strict=True))
    teachers, students = (dict(first=x[0], second=x[1]) for x in (teacher, student))
    torch.testing.assert_close(loss.compute_loss(teachers, students), wanted)
    with pytest.raises(ValueError, match="structure|keys"):  # not the first with the second
        loss.compute_loss(dict(second=teacher[0], third=teacher[1]), students)


def test_a_temperature_that_is_set_later_counts():
    student, teacher, _ = problem(B, V)
    for make in (LogitsDistillation, theirs):
        loss = make(3.0)
        loss.temperature = 1.5  # as a schedule does
        assert loss.compute_loss(teacher, student) == make(1.5).compute_loss(teacher, student)
        assert loss.get_config()["temperature"] == 1.5


def model(width, classes=V):
    layers = [keras.layers.Dense(width, activation="relu"), keras.layers.Dense(classes)]
    return keras.Sequential([keras.Input((5,)), *layers])


def distiller(**options):
    keras.utils.set_random_seed(0)
    return keras.distillation.Distiller(
        teacher=model(16),
        student=model(8),
        distillation_losses=LogitsDistillation(temperature=2.0, **options),
        student_loss_weight=0.25,
    )


def fit(found, epochs=20):
    x, y = torch.randn(64, 5), torch.randint(V, (64,))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    found.compile(optimizer=keras.optimizers.Adam(0.01), loss=loss)
    return x, y, found.fit(x, y, epochs=epochs, batch_size=64, verbose=0).history


def test_a_distiller_fits():
    found = distiller()
    before = [w.clone() for w in map(keras.ops.convert_to_tensor, found.teacher.weights)]
    x, y, history = fit(found)
    assert history["distillation_loss"][-1] < 0.5 * history["distillation_loss"][0]
    after = map(keras.ops.convert_to_tensor, found.teacher.weights)
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_a_distillers_loss_is_the_one_of_its_models():
    found = distiller()
    x, y = torch.randn(64, 5), torch.randint(V, (64,))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    found.compile(optimizer="sgd", loss=loss)
    value = found.compute_loss(x, y)
    wanted = kd_loss(found.student(x), found.teacher(x).detach(), y, temperature=2.0, alpha=0.75)
    torch.testing.assert_close(value, wanted)


def test_a_saved_distiller_comes_back(tmp_path):
    found = distiller(divergence="jsd", beta=0.2)
    x, y, _ = fit(found, epochs=1)
    found.save(tmp_path / "distiller.keras")
    again = keras.saving.load_model(tmp_path / "distiller.keras")
    (loss,) = again.distillation_losses
    assert type(loss) is LogitsDistillation
    assert loss.get_config() == dict(temperature=2.0, divergence="jsd", beta=0.2)
    torch.testing.assert_close(again(x), found(x))


def test_on_another_backend_it_says_what_it_needs(monkeypatch):
    module = importlib.import_module("kdkernels.integrations.keras")
    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    with pytest.raises(ImportError, match="set KERAS_BACKEND=torch .* it is on jax"):
        importlib.reload(module)
