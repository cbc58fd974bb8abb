"""TRL's own DPOTrainer on pictures: one line more, and the picture and question of a pair are computed once, not twice.

    pip install -e ".[examples,trl]"
    python examples/vlm_dpo.py                    # pictures and questions once
    python examples/vlm_dpo.py --off              # without the line: the same losses, slower

Nothing is downloaded. The script draws pictures of coloured shapes, makes a small LLaVA with random weights and its
processor, and trains all weights to prefer answers that name the right colour. Writes vlm_dpo.png to --output.
TRL itself reports its use to Hugging Face; HF_HUB_DISABLE_TELEMETRY=1 in the environment stops that.
"""

import argparse
import copy
import random
from pathlib import Path

import matplotlib.pyplot as plt
import transformers
from datasets import Dataset
from PIL import Image, ImageDraw
from tokenizers import Tokenizer, models, pre_tokenizers
from trl import DPOConfig, DPOTrainer

import flexpatch
from flexpatch.callbacks import SavingsCallback

COLOURS = dict(red=(220, 40, 40), green=(40, 180, 60), blue=(50, 70, 220), yellow=(235, 215, 50))
SHAPES = ("circle", "square", "triangle")
SIDE, PATCH = 56, 7  # pixels: 64 image tokens
WORDS = ["<pad>", "</s>", "<image>", "USER:", "ASSISTANT:", "What", "is", "shown", "?", "It", "a", "."]
CHAT = """{% for m in messages %}{{ ' USER: ' if m.role == 'user' else ' ' }}{% for part in m.content %}
{{ '<image>' if part.type == 'image' else part.text }} {% endfor %}{% endfor %}
{{ 'ASSISTANT:' if add_generation_prompt }}"""


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--off", action="store_true", help="stock training, for comparison")
    add("--pairs", type=int, default=64, help="to train on; half as many are held out (%(default)s)")
    add("--steps", type=int, default=40, help="(%(default)s)")
    add("--batch-size", type=int, default=8, help="pairs a step (%(default)s)")
    add("--lr", type=float, default=1e-3, help="(%(default)s)")
    add("--output", type=Path, default=Path("runs/vlm_dpo"), help="(%(default)s)")
    return parser.parse_args()


def draw(rng, colour, shape):
    """Draw a shape somewhere on a grey ground."""
    image = Image.new("RGB", (SIDE, SIDE), (rng.randrange(90, 200),) * 3)
    size, pen = rng.randrange(SIDE // 3, SIDE // 2), ImageDraw.Draw(image)
    x, y = rng.randrange(SIDE - size), rng.randrange(SIDE - size)
    if shape == "triangle":
        pen.polygon([(x, y + size), (x + size, y + size), (x + size // 2, y)], fill=COLOURS[colour])
    else:
        (pen.ellipse if shape == "circle" else pen.rectangle)([x, y, x + size, y + size], fill=COLOURS[colour])
    return image


def pairs(rng, count):
    """Make pairs about pictures: the chosen answer names the colour that is there, the rejected one another."""
    rows = []
    for _ in range(count):
        colours, shape = rng.sample(list(COLOURS), 2), rng.choice(SHAPES)
        row = dict(images=[draw(rng, colours[0], shape)], prompt=[dict(role="user", content="What is shown ?")])
        for name, colour in zip(("chosen", "rejected"), colours, strict=True):
            row[name] = [dict(role="assistant", content=f"It is a {colour} {shape} .")]
        rows.append(row)
    return Dataset.from_list(rows)


def make_model():
    """Make a small LLaVA and its processor."""
    words = [*WORDS, *COLOURS, *SHAPES]
    plain = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = dict(pad_token="<pad>", eos_token="</s>", additional_special_tokens=["<image>"])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=plain, **special)
    square = dict(height=SIDE, width=SIDE)
    images = transformers.CLIPImageProcessor(size=square, crop_size=square)
    processor = transformers.LlavaProcessor(images, tokenizer, PATCH, "full", CHAT)
    sizes = dict(num_hidden_layers=2, num_attention_heads=4)
    text = dict(model_type="llama", vocab_size=len(words), hidden_size=256, intermediate_size=512, **sizes)
    tower = dict(model_type="siglip_vision_model", image_size=SIDE, patch_size=PATCH, **sizes)
    config = transformers.LlavaConfig(
        text_config=text, vision_config=dict(tower, hidden_size=128, intermediate_size=256), image_token_index=2,
        image_seq_length=(SIDE // PATCH) ** 2, vision_feature_select_strategy="full", vision_feature_layer=-1,
    )  # fmt: skip
    return transformers.AutoModelForImageTextToText.from_config(config), processor


def plot(logs, path):
    """Draw losses and the held-out accuracy over the steps."""
    plt.switch_backend("Agg")  # needs no screen
    figure, panels = plt.subplots(1, 2, figsize=(8, 3.4), layout="constrained")
    names = {"loss": "training batch", "eval_loss": "held out", "eval_rewards/accuracies": "held out"}
    for (name, label), panel in zip(names.items(), (panels[0], *panels), strict=True):
        points = [(log["step"], log[name]) for log in logs if name in log]
        panel.plot(*zip(*points, strict=True), label=label)
    panels[0].set(title="DPO loss (nats)", xlabel="step")
    panels[1].set(title="reward accuracy", xlabel="step", ylim=(0, 1.05))
    panels[0].legend()
    figure.savefig(path, dpi=130)


def main():
    args = parse_args()
    transformers.set_seed(0)
    model, processor = make_model()

    if not args.off:
        # ---- The one line that shares prompts and pictures: ----
        model = flexpatch.apply(model)

    config = DPOConfig(
        output_dir=str(args.output), max_steps=args.steps, per_device_train_batch_size=args.batch_size,
        learning_rate=args.lr, gradient_checkpointing=False, bf16=False, logging_steps=1, save_strategy="no",
        report_to="none", eval_strategy="steps", eval_steps=max(1, args.steps // 5),
    )  # fmt: skip
    rng = random.Random(0)
    trainer = DPOTrainer(
        model,
        copy.deepcopy(model),  # the reference, patched as the model is
        config,
        train_dataset=pairs(rng, args.pairs),
        eval_dataset=pairs(rng, args.pairs // 2),
        processing_class=processor,
        callbacks=[] if args.off else [SavingsCallback()],  # adds what was saved to the trainer's logs
    )
    seconds = trainer.train().metrics["train_runtime"]
    logs = trainer.state.log_history
    plot(logs, args.output / "vlm_dpo.png")
    print(f"{seconds:.0f} seconds, evaluation included")
    print("losses: " + ", ".join(f"{log['loss']:.6f}" for log in logs if "loss" in log))
    print("held out, accuracy: " + ", ".join(f"{x['eval_rewards/accuracies']:.2f}" for x in logs if "eval_loss" in x))
    print("flexpatch is off" if args.off else flexpatch.savings(model))


if __name__ == "__main__":
    main()
