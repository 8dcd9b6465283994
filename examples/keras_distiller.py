"""Keras: the loss that its own `Distiller` fits."""

import os

os.environ["KERAS_BACKEND"] = "torch"  # read when keras is imported

import keras  # noqa: E402
import tiny  # noqa: E402

from kdkernels.integrations.keras import LogitsDistillation  # noqa: E402


def language_model(width):
    """Tokens (B, L) -> logits (B, L, V) of the next token."""
    layers = [keras.layers.Embedding(tiny.VOCAB, width), keras.layers.Dense(width, "gelu")]
    return keras.Sequential([keras.Input((None,)), *layers, keras.layers.Dense(tiny.VOCAB)])


def fit(model, epochs):
    hard = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=keras.optimizers.Adam(1e-2), loss=hard)
    tokens = tiny.load_text().numpy()  # (N, L)
    options = dict(batch_size=tiny.BATCH, epochs=epochs, verbose=0)
    return model.fit(tokens[:, :-1], tokens[:, 1:], **options).history


keras.utils.set_random_seed(0)
teacher = language_model(128)
fit(teacher, epochs=1)
distiller = keras.distillation.Distiller(
    teacher=teacher,
    student=language_model(64),
    distillation_losses=LogitsDistillation(temperature=2.0),
)
losses = fit(distiller, epochs=2)["distillation_loss"]
print(f"loss: {losses[0]:.3f} in epoch 1, {losses[-1]:.3f} in epoch {len(losses)}")
