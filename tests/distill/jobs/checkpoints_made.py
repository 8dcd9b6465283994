"""Tiny checkpoints and data in directories, made here."""

import torch

WORDS = "the a cat dog bird sees hears likes small red old and then one two".split()
EOS, UNKNOWN = "<eos>", "<unk>"


def tokenizer(words=WORDS, eos=EOS):
    import tokenizers
    import transformers

    model = tokenizers.models.WordLevel(
        {x: k for k, x in enumerate([UNKNOWN, eos, *words])}, UNKNOWN
    )
    words = tokenizers.Tokenizer(model)
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token=eos, unk_token=UNKNOWN
    )


def language_model(folder, *, seed=0, tokens=None, kind="Llama", dtype=None, **options):
    """Saves a model, and its tokenizer unless that is False -> the directory."""
    import transformers

    tokens = tokenizer() if tokens is None else tokens
    config = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    config.update(vocab_size=len(WORDS) + 2, max_position_embeddings=64)
    config.update(num_key_value_heads=1, bos_token_id=1, eos_token_id=1, pad_token_id=0)
    torch.manual_seed(seed)
    made = getattr(transformers, f"{kind}Config")(**{**config, **options})
    model = transformers.AutoModelForCausalLM.from_config(made)
    model.to(dtype).save_pretrained(folder)
    if tokens:
        tokens.save_pretrained(folder)
    return folder


def models_and_texts(root):
    """The directories `student`, `teacher`, which is larger, and `data` -> the one they are in."""
    language_model(root / "student")
    language_model(root / "teacher", seed=1, hidden_size=32, num_hidden_layers=3)
    texts(root / "data")
    return root


def texts(folder, count=6, lines=12):
    """Text files of sentences -> the directory."""
    folder.mkdir(exist_ok=True)
    generator = torch.Generator().manual_seed(count)
    for k in range(count):
        found = []
        for _ in range(lines):
            # A grammar: adjective, noun, verb, adjective, noun.
            picks = [torch.randint(n, (), generator=generator).item() for n in (3, 3, 3, 3, 3)]
            places = zip((8, 2, 5, 8, 2), picks, strict=True)
            found.append("the " + " ".join(WORDS[base + pick] for base, pick in places))
        (folder / f"{k}.txt").write_text("\n".join(found))
    return folder


def image_model(folder, *, seed=0, labels=None, processor=None, **options):
    """Saves a small ViT -> the directory."""
    import transformers

    config = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    config.update(image_size=8, patch_size=4, num_channels=3)
    if labels is not None:
        config.update(id2label=dict(enumerate(labels)))
        config.update(label2id={name: k for k, name in enumerate(labels)})
    torch.manual_seed(seed)
    made = transformers.ViTConfig(**{**config, **options})
    transformers.ViTForImageClassification(made).save_pretrained(folder)
    if processor is not None:
        processor.save_pretrained(folder)
    return folder


def images(folder, names=("blue", "red"), count=6):
    """A folder of PNG images of a colour for each class -> the directory."""
    from PIL import Image

    for place, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for k in range(count):
            pixel = [30 * k] * 3
            pixel[place % 3] = 255
            Image.new("RGB", (10, 9), tuple(pixel)).save(folder / name / f"{k}.png")
    return folder
