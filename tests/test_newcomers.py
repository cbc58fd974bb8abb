"""What people do with models, each once: a patched model gives what its unpatched twin gives.

A case is a function of a ``Way``, which makes models, patched or not. It returns tensors. One test runs every case with
unpatched models, with patched ones, and with patched ones whose answers see each other: that must be noticed wherever a
case says that its batches fold.
"""

import copy
import io
import pickle
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import accelerate
import peft
import pytest
import torch
import transformers
from datasets import Dataset
from helpers.oracle import see_siblings
from helpers.tokenizers_offline import make_tokenizer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, TextIteratorStreamer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import flexpatch
from flexpatch.float64 import Float64 as _Float64
from flexpatch.fold import build_rows
from flexpatch.models import TINY, tiny_model

ROOT = Path(__file__).resolve().parent.parent
F64 = torch.float64
BOUND = 1e-10
ROUNDED = 1e-7  # where transformers' norms and ropes round to float32
CONTROL = 1000


@dataclass
class Way:
    """How a case gets its models. ``dtype`` is that of new ones."""

    patched: bool
    dtype: torch.dtype = F64
    models: list[Any] = field(default_factory=list)

    def __call__(self, model: Any, **options: Any) -> Any:
        """The model, patched if this is the way of patched ones."""
        if self.patched:
            flexpatch.apply(model, **options)
            self.models.append(model)
        return model

    def bare(self, kind: str = "llama", variant: int = 0) -> Any:
        """A model that the case patches later, by itself."""
        return shallow(kind, variant, self.dtype)

    def model(self, kind: str = "llama", variant: int = 0) -> Any:
        return self(self.bare(kind, variant))

    def lora(self, **settings: Any) -> Any:
        return self(lora(self.bare(), **settings))

    def folded(self) -> int:
        """Batches that ran as rows of prefix trees."""
        return sum(flexpatch.savings(model).folded for model in self.models if flexpatch.is_applied(model))


def shallow(kind: str, variant: int = 0, dtype: torch.dtype = F64, seed: int = 0) -> Any:
    """A tiny model; of two layers, unless its layers are of several kinds."""
    with pytest.MonkeyPatch.context() as patch:
        if kind == "llama":
            patch.setitem(TINY, "num_hidden_layers", 2)
        return tiny_model(kind, variant, dtype=dtype, seed=seed)


Case = Callable[[Way], Any]
CASES: dict[str, tuple[Case, dict[str, Any]]] = {}


def case(
    *, folds: bool, bound: float = BOUND, dtype: torch.dtype = F64, slow: bool = False, exactly: bool = False,
    control: bool = True,
) -> Callable[[Case], Case]:  # fmt: skip
    """Add a case.

    Args:
        folds: Whether batches fold.
        bound: Largest difference allowed.
        dtype: Below float32 no bound holds; there the patched model may be twice as far from float64 as its twin.
        slow: Left to ``pytest -m slow``.
        exactly: Equal bits are asked for.
        control: Whether a wrong patch would be noticed; not where nothing of it may be left, or nothing is computed.
    """

    def add(function: Case) -> Case:
        assert function.__name__ not in CASES
        settings = dict(folds=folds, bound=0 if exactly else bound, dtype=dtype, slow=slow, control=control)
        CASES[function.__name__] = function, settings
        return function

    return add


def lora(model: Any, **settings: Any) -> Any:
    """With adapters that are not zero."""
    settings = dict(target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM") | settings
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return peft.get_peft_model(model, peft.LoraConfig(**settings))


def batch(side: str = "right", largest: int = 151) -> dict[str, Tensor]:
    """Two prompts, each with two answers, padded: 4 x 52 ids."""
    generator = torch.Generator().manual_seed(1)

    def draw(count: int) -> Tensor:
        return torch.randint(3, largest, (count,), generator=generator)

    prompts = [draw(40), draw(33)]
    sequences = [torch.cat([prompt, draw(length)]) for prompt in prompts for length in (9, 12)]
    ids, mask = torch.zeros(4, 52, dtype=torch.int64), torch.zeros(4, 52, dtype=torch.int64)
    for row, sequence in enumerate(sequences):
        where = slice(52 - len(sequence), None) if side == "left" else slice(len(sequence))
        ids[row, where], mask[row, where] = sequence, 1
    return dict(input_ids=ids, attention_mask=mask)


def logits(model: Any, call: dict[str, Any] | None = None, **more: Any) -> Tensor:
    """Where there are tokens."""
    call = batch() if call is None else call
    mask = call["attention_mask"]
    return model(**(call | dict(use_cache=False) | more)).logits[mask != 0]


def loss_of(model: Any, call: dict[str, Any] | None = None, **more: Any) -> Tensor:
    """Log-probs of the next tokens, weighed unequally."""
    call = batch() if call is None else call
    out = model(**(call | dict(use_cache=False) | more)).logits[:, :-1].log_softmax(-1)
    logps = out.gather(-1, call["input_ids"][:, 1:, None])[..., 0] * call["attention_mask"][:, 1:]
    return (logps.sum(1) * torch.tensor([1.0, -1.0, 0.5, -0.25]).to(logps)).sum() / 50


def gradients(model: Any) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def step(model: Any, **more: Any) -> tuple[Tensor, Tensor]:
    loss = loss_of(model, **more)
    loss.backward()
    return loss.detach(), gradients(model)


def trained(model: Any, steps: int = 2, **more: Any) -> Tensor:
    """A loss after so many optimizer steps."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model, **more).backward()
        optimizer.step()
    with torch.no_grad():
        return logits(model)


# Dtypes, devices, modes ---------------------------------------------------------------------------------------------


@case(folds=True)
def forward(way: Way) -> Any:
    return logits(way.model())


@case(folds=True)
def a_training_step(way: Way) -> Any:
    return step(way.model().train())


@case(folds=True)
def no_grad(way: Way) -> Any:
    with torch.no_grad():
        return logits(way.model())


@case(folds=True)
def inference_mode(way: Way) -> Any:
    model = way.model()
    with torch.inference_mode():
        first = logits(model)
    return first, logits(model)  # and then outside of it


@case(folds=False, exactly=True)
def a_call_with_nothing_said_about_caches(way: Way) -> Any:
    with torch.no_grad():
        out = way.model()(**batch())
    return out.logits, out.past_key_values.layers[-1].keys


@case(folds=True, bound=1e-4)
def float_after_apply(way: Way) -> Any:
    return logits(way.model().float())


@case(folds=True, dtype=torch.float32, bound=1e-4)
def double_after_apply(way: Way) -> Any:
    return logits(way.model().double())


@case(folds=True, dtype=torch.bfloat16)
def bfloat16(way: Way) -> Any:
    return logits(way.model())


@case(folds=True, dtype=torch.float16)
def half(way: Way) -> Any:
    return logits(way.model())


@case(folds=True, dtype=torch.bfloat16)
def bfloat16_after_apply(way: Way) -> Any:
    return logits(way(shallow("llama")).to(way.dtype))


@case(folds=True, dtype=torch.bfloat16)
def autocast(way: Way) -> Any:
    model = way(shallow("llama", dtype=torch.float32 if way.dtype != F64 else F64))
    with torch.autocast("cpu", torch.bfloat16, enabled=way.dtype != F64):
        return logits(model)


@case(folds=True)
def meta_device_and_to_empty(way: Way) -> Any:
    whole = way.bare()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(whole.config, dtype=way.dtype)
    model = way(model).to_empty(device="cpu")
    model.load_state_dict(whole.state_dict())
    model.model.rotary_emb = copy.deepcopy(whole.model.rotary_emb)  # buffers that no checkpoint holds
    return logits(model.eval())


@case(folds=True)
def train_and_eval_flips(way: Way) -> Any:
    model = way.model()
    return [logits(model.train(mode)) for mode in (True, False, True, False)]


@case(folds=True)
def device_map_to_the_cpu(way: Way) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        way.bare().save_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, device_map={"": "cpu"}, dtype=way.dtype)
    return logits(way(model))


# Apply, remove, copies, files ---------------------------------------------------------------------------------------


@case(folds=True)
def apply_twice(way: Way) -> Any:
    return step(way(way.model()))


@case(folds=True)
def apply_remove_apply(way: Way) -> Any:
    model = way.model()
    first = logits(model)
    flexpatch.remove(model)
    between = logits(model)
    way(model)
    return first, between, logits(model)


@case(folds=False, exactly=True, control=False)
def apply_and_remove(way: Way) -> Any:
    model = flexpatch.remove(way.model())
    return step(model)


@case(folds=True)
def deepcopy(way: Way) -> Any:
    model = way.model()
    logits(model)
    return step(copy.deepcopy(model))


@case(folds=True)
def pickled(way: Way) -> Any:
    model = way.model()
    logits(model)
    return step(pickle.loads(pickle.dumps(model)))


@case(folds=True)
def torch_save_of_a_whole_model(way: Way) -> Any:
    model, buffer = way.model(), io.BytesIO()
    logits(model)
    torch.save(model, buffer)
    buffer.seek(0)
    return logits(torch.load(buffer, weights_only=False))


@case(folds=True)
def state_dicts(way: Way) -> Any:
    model, other = way.model(), way.bare()
    weights = {name: value * 1.1 for name, value in other.state_dict().items()}
    assert model.load_state_dict(weights).missing_keys == []
    other.load_state_dict(model.state_dict())
    return logits(model), logits(other)


@case(folds=True)
def save_and_load(way: Way) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        model = way.model()
        logits(model)
        model.save_pretrained(folder)
        again = AutoModelForCausalLM.from_pretrained(folder, dtype=way.dtype)
        return logits(again), logits(way(again))


LOAD = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float64)
assert "flexpatch" not in sys.modules
torch.save(model(**torch.load(sys.argv[1] + "/batch.pt"), use_cache=False).logits.detach(), sys.argv[1] + "/out.pt")
"""


@case(folds=True, slow=True, bound=ROUNDED)
def save_and_load_in_a_process_without_us(way: Way) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        model = way.model()
        first = logits(model)
        model.save_pretrained(folder)
        torch.save(batch(), f"{folder}/batch.pt")
        subprocess.run([sys.executable, "-c", LOAD, folder], check=True, cwd=folder, timeout=300)
        return first, torch.load(f"{folder}/out.pt")[batch()["attention_mask"] != 0]


@case(folds=True)
def moving_averages_of_weights(way: Way) -> Any:
    model = way.model()
    averaged = torch.optim.swa_utils.AveragedModel(model)
    trained(model)
    averaged.update_parameters(model)
    return logits(averaged.module)


# Weights ------------------------------------------------------------------------------------------------------------


@case(folds=True)
def resized_vocabulary(way: Way) -> Any:
    model = way.model()
    torch.manual_seed(0)
    model.resize_token_embeddings(170)
    more = batch(largest=170)
    smaller = logits(model, more)[:, :140]
    model.resize_token_embeddings(100)
    return smaller, logits(model, batch(largest=100))


@case(folds=True)
def frozen_layers(way: Way) -> Any:
    model = way.model().train()
    for parameter in (*model.model.layers[:1].parameters(), *model.model.embed_tokens.parameters()):
        parameter.requires_grad_(False)
    return step(model)


@case(folds=True)
def tied_and_untied(way: Way) -> Any:
    model = way.model()
    model.config.tie_word_embeddings = True
    model.lm_head.weight = model.model.embed_tokens.weight
    tied = step(model)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    model.zero_grad()
    return tied, step(model)


@case(folds=True)
def policy_and_reference_share_weights(way: Way) -> Any:
    policy, reference = way.model().train(), way(way.bare())
    for name, _parameter in list(reference.named_parameters()):
        module, _, key = name.rpartition(".")
        setattr(reference.get_submodule(module), key, policy.get_parameter(name))
    with torch.no_grad():
        before = logits(reference)
    return before, step(policy), logits(reference)


@case(folds=True)
def two_models_in_one_process(way: Way) -> Any:
    one, other = way.model(), way.model("gemma3_text")
    return [logits(model) for model in (one, other, one, other)]


@case(folds=True)
def one_patched_and_one_not(way: Way) -> Any:
    one, other = way.model(), shallow("llama", seed=3)
    return [logits(model) for model in (one, other, one, other)]


# Adapters -----------------------------------------------------------------------------------------------------------


@case(folds=True)
def lora_step(way: Way) -> Any:
    return step(way.lora().train())


@case(folds=True)
def lora_after_apply(way: Way) -> Any:
    return step(lora(way.model()).train())


@case(folds=True)
def merge_and_unload(way: Way) -> Any:
    model = way.lora()
    first = logits(model)
    merged = model.merge_and_unload()
    return first, logits(merged), step(merged.requires_grad_(True))


@case(folds=True)
def unload(way: Way) -> Any:
    return logits(way.lora().unload())


@case(folds=True)
def adapters_added_switched_and_deleted(way: Way) -> Any:
    model = way.lora()
    torch.manual_seed(7)
    model.add_adapter("other", peft.LoraConfig(target_modules=["o_proj"], init_lora_weights=False))
    found = []
    for name in ("default", "other", "default"):
        model.set_adapter(name)
        found += [logits(model), step(model)]
        model.zero_grad()
    with model.disable_adapter():
        found.append(logits(model))
    model.delete_adapter("default")
    model.set_adapter("other")
    return [*found, logits(model)]


@case(folds=True)
def adapters_saved_and_loaded(way: Way) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        way.lora().save_pretrained(folder)
        return logits(way(peft.PeftModel.from_pretrained(way.bare(), folder)))


# Calls --------------------------------------------------------------------------------------------------------------


@case(folds=True)
def labels_given_to_forward(way: Way) -> Any:
    model, call = way.model(), batch()
    labels = call["input_ids"].masked_fill(call["attention_mask"] == 0, -100)
    loss = model(**call, labels=labels, use_cache=False).loss
    loss.backward()
    return loss, gradients(model)


@case(folds=True)
def return_dict_false(way: Way) -> Any:
    return way.model()(**batch(), use_cache=False, return_dict=False)[0][batch()["attention_mask"] != 0]


@case(folds=True)
def hidden_states_of_all_layers(way: Way) -> Any:
    states = way.model()(**batch(), use_cache=False, output_hidden_states=True).hidden_states
    return [each[batch()["attention_mask"] != 0] for each in states]


@case(folds=False, control=False)
def attention_weights(way: Way) -> Any:
    model = way.bare()
    model.set_attn_implementation("eager")
    return way(model)(**batch(), use_cache=False, output_attentions=True).attentions[-1]


@case(folds=True)
def logits_of_the_last_positions(way: Way) -> Any:
    return way.model()(**batch("left"), use_cache=False, logits_to_keep=3).logits


@case(folds=True)
def arguments_by_position(way: Way) -> Any:
    call = batch()
    return way.model()(call["input_ids"], call["attention_mask"], use_cache=False).logits[call["attention_mask"] != 0]


@case(folds=True)
def the_backbone_alone(way: Way) -> Any:
    call = batch()
    return way.model().base_model(**call, use_cache=False).last_hidden_state[call["attention_mask"] != 0]


@case(folds=True)
def left_padding(way: Way) -> Any:
    call = batch("left")
    positions = (call["attention_mask"].cumsum(1) - 1).clamp(min=0)
    return logits(way.model(), call, position_ids=positions)


def masks_of(kind: Any) -> Case:
    def run(way: Way) -> Any:
        call = batch()
        return logits(way.model(), call | dict(attention_mask=call["attention_mask"].to(kind)))

    run.__name__ = f"masks_of_{str(kind).removeprefix('torch.')}"
    return run


for _dtype in (torch.bool, torch.int32, torch.float32):
    case(folds=True)(masks_of(_dtype))


@case(folds=True)
def no_mask_at_all(way: Way) -> Any:
    ids = batch()["input_ids"][:, :44]
    return way.model()(ids, use_cache=False).logits


@case(folds=True)
def positions_given(way: Way) -> Any:
    return logits(way.model(), position_ids=torch.arange(52)[None])


@case(folds=False)
def embeddings_given(way: Way) -> Any:
    model, call = way.model(), batch()
    embedded = model.get_input_embeddings()(call["input_ids"])
    return logits(model, call | dict(input_ids=None), inputs_embeds=embedded)


@case(folds=True)
def token_types_of_text(way: Way) -> Any:
    call = batch()
    return logits(way.model("gemma3"), call, token_type_ids=torch.zeros_like(call["input_ids"]))


@case(folds=False)
def a_batch_of_one(way: Way) -> Any:
    call = {key: value[:1, :49] for key, value in batch().items()}
    return logits(way.model(), call)


@case(folds=True)
def a_row_of_padding(way: Way) -> Any:
    call = batch()
    call["attention_mask"][1] = 0
    return logits(way.model(), call)


@case(folds=False, control=False)
def an_empty_batch(way: Way) -> Any:
    """No rows, and no columns: the same shape or the same error."""
    model, found = way.model(), []
    for shape in ((0, 5), (2, 0)):
        try:
            found.append(torch.tensor(model(torch.zeros(shape, dtype=torch.int64), use_cache=False).logits.shape))
        except Exception as error:
            found += ascii_of([type(error).__name__])
    return found


@case(folds=True)
def a_classifier(way: Way) -> Any:
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(shallow("llama").config, dtype=way.dtype)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.15)
    return way(model.eval())(**batch(), use_cache=False).logits


# Training -----------------------------------------------------------------------------------------------------------


@case(folds=True)
def several_steps(way: Way) -> Any:
    return trained(way.model().train())


@case(folds=True)
def gradient_accumulation_and_clipping(way: Way) -> Any:
    model, call = way.model().train(), batch()
    for rows in (slice(0, 2), slice(2, 4)):
        part = {key: value[rows] for key, value in call.items()}
        logits(model, part).log_softmax(-1)[:, 3].sum().mul(0.01).backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    return norm, gradients(model)


def checkpointed(reentrant: bool, later: bool) -> Case:
    def run(way: Way) -> Any:
        model = way.model() if later else way.bare()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        if reentrant:
            model.enable_input_require_grads()
        model = model if later else way(model)
        return step(model.train())

    run.__name__ = f"checkpointing_{'reentrant' if reentrant else 'anew'}_{'after' if later else 'before'}_apply"
    return run


for _reentrant in (True, False):
    for _later in (True, False):
        case(folds=True, bound=ROUNDED)(checkpointed(_reentrant, _later))


@case(folds=True, bound=ROUNDED)
def checkpointing_on_and_off(way: Way) -> Any:
    model = way.model().train()
    found = [step(model)]
    for switch in (model.gradient_checkpointing_enable, model.gradient_checkpointing_disable):
        switch()
        model.zero_grad()
        found.append(step(model))
    return found


@case(folds=True)
def an_evaluation_between_steps(way: Way) -> Any:
    model = way.model()
    found = []
    for _ in range(2):
        found.append(trained(model.train(), 1))
        with torch.no_grad():
            found.append(logits(model.eval()))
    return found


@case(folds=True)
def prepared_by_accelerate(way: Way) -> Any:
    accelerator = accelerate.Accelerator(cpu=True)
    model = accelerator.prepare(way.model().train())
    loss = loss_of(model)
    accelerator.backward(loss)
    return loss, gradients(model), logits(accelerator.unwrap_model(model))


@case(folds=True)
def data_parallel(way: Way) -> Any:
    return step(nn.DataParallel(way.model()))


@case(folds=True)
def hooks_of_users(way: Way) -> Any:
    model, seen = way.model(), []
    model.lm_head.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    model.model.norm.register_forward_pre_hook(lambda module, args: None)
    model.model.register_forward_hook(lambda module, args, output: seen.append(output.last_hidden_state))
    mask = batch()["attention_mask"] != 0
    return logits(model), [each[mask] for each in seen]


@case(folds=True)
def watched_gradients(way: Way) -> Any:
    """As wandb.watch does: hooks on parameters, and of modules' backward passes."""
    model, seen = way.model().train(), []
    for parameter in model.parameters():
        parameter.register_hook(lambda gradient: seen.append(gradient.norm()))
    model.lm_head.register_full_backward_hook(lambda module, given, returned: seen.append(given[0].norm()))
    found = step(model)
    return found, torch.stack(sorted(seen))


@case(folds=True)
def threads(way: Way) -> Any:
    model = way.model()
    found: dict[int, Tensor] = {}

    def work(number: int) -> None:
        with torch.no_grad(), _Float64():
            for _ in range(3):
                found[number] = logits(model, batch("left" if number % 2 else "right"), position_ids=positions(number))

    def positions(number: int) -> Tensor:
        mask = batch("left" if number % 2 else "right")["attention_mask"]
        return (mask.cumsum(1) - 1).clamp(min=0)

    workers = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return [found[number] for number in range(4)]


@case(folds=True, slow=True, bound=ROUNDED)
def torch_compile_of_the_whole_model(way: Way) -> Any:
    torch._dynamo.reset()
    model = way.model()
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        return logits(compiled), logits(compiled, batch("left"))


# Generation ---------------------------------------------------------------------------------------------------------


def prompts() -> dict[str, Tensor]:
    return {key: value[:, :45] for key, value in batch("left").items()}


def generated(way: Way, kind: str = "llama", **settings: Any) -> Any:
    model = way.model(kind)
    torch.manual_seed(4)
    settings = dict(max_new_tokens=6, do_sample=False, pad_token_id=0) | settings
    out = model.generate(**prompts(), return_dict_in_generate=True, output_logits=True, **settings)
    return out.sequences, [] if settings.get("num_beams") else list(out.logits)


GENERATION: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": dict(do_sample=True, top_p=0.9),
    "beams": dict(num_beams=3),
    "without_a_cache": dict(use_cache=False),
    "static_cache": dict(cache_implementation="static"),
    "penalties": dict(repetition_penalty=1.3, no_repeat_ngram_size=2),
    "several_sequences": dict(do_sample=True, num_return_sequences=3),
}


def generation(name: str) -> Case:
    def run(way: Way) -> Any:
        return generated(way, **GENERATION[name])

    run.__name__ = f"generation_{name}"
    return run


for _name in GENERATION:
    # Without a cache each step is a batch like any other. With one, bits are those of the original attention.
    case(folds=_name == "without_a_cache", exactly=_name != "without_a_cache", slow=_name == "static_cache")(
        generation(_name)
    )


@case(folds=False, exactly=True)
def generation_with_windows(way: Way) -> Any:
    return generated(way, "gemma3_text")


@case(folds=False, exactly=True)
def assisted_generation(way: Way) -> Any:
    model, draft = way.model(), way(way.bare())
    one = {key: value[:1] for key, value in prompts().items()}
    return model.generate(**one, assistant_model=draft, max_new_tokens=6, do_sample=False, pad_token_id=0)


@case(folds=False, exactly=True)
def prompt_lookup(way: Way) -> Any:
    one = {key: value[:1] for key, value in prompts().items()}
    return way.model().generate(**one, prompt_lookup_num_tokens=3, max_new_tokens=6, do_sample=False, pad_token_id=0)


@case(folds=True)
def training_between_generations(way: Way) -> Any:
    model = way.model()
    found = []
    for _ in range(2):
        found.append(model.eval().generate(**prompts(), max_new_tokens=4, do_sample=False, pad_token_id=0))
        found.append(trained(model.train(), 1))
    return found


@case(folds=False, exactly=True)
def stepping_through_a_cache(way: Way) -> Any:
    model, call = way.model(), batch("left")
    found, cache = [], None
    with torch.no_grad():
        for stop in (20, 40, 41, 42):
            at = 0 if cache is None else cache.get_seq_length()
            out = model(
                call["input_ids"][:, at:stop], call["attention_mask"][:, :stop], past_key_values=cache, use_cache=True
            )
            cache = out.past_key_values
            found.append(out.logits)
    return found


@contextmanager
def words() -> Iterator[Any]:
    """A tokenizer, and models that have its vocabulary."""
    tokenizer = make_tokenizer()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TINY, "vocab_size", len(tokenizer))
        yield tokenizer


def ascii_of(texts: list[str]) -> list[Tensor]:
    return [torch.tensor(list(text.encode()), dtype=torch.float64) for text in texts]


@case(folds=False, exactly=True)
def pipelines(way: Way) -> Any:
    with words() as tokenizer:
        tokenizer.padding_side = "left"
        pipe = transformers.pipeline("text-generation", model=way.model(), tokenizer=tokenizer, device="cpu")
        given = ["The cat sat", "What is the capital of France?"]
        out = pipe(given, batch_size=2, max_new_tokens=5, do_sample=False)
    return ascii_of([each[0]["generated_text"] for each in out])


@case(folds=False, exactly=True)
def chats_with_tools(way: Way) -> Any:
    with words() as tokenizer:
        tokenizer.chat_template = "{{ tools[0]['function']['name'] }}" + tokenizer.chat_template
        tools = [{"type": "function", "function": {"name": "find", "parameters": {"type": "object", "properties": {}}}}]
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": "Cat?"}], tools=tools, add_generation_prompt=True, return_tensors="pt",
            return_dict=True,
        )  # fmt: skip
        return way.model().generate(**ids, max_new_tokens=5, do_sample=False)


@case(folds=False, exactly=True)
def streams(way: Way) -> Any:
    with words() as tokenizer:
        streamer = TextIteratorStreamer(tokenizer)
        ids = tokenizer(["The cat sat"], return_tensors="pt")["input_ids"]
        settings = dict(input_ids=ids, streamer=streamer, max_new_tokens=5, do_sample=False)
        worker = threading.Thread(target=way.model().generate, kwargs=settings)
        worker.start()
        text = "".join(streamer)
        worker.join()
    return ascii_of([text])


# Trainers -----------------------------------------------------------------------------------------------------------


def pairs(count: int = 8) -> Dataset:
    rows = [
        {"prompt": f"The cat sat on the mat, and the dog {n} sat on the", "chosen": " log.", "rejected": f" cat {n}."}
        for n in range(count)
    ]
    return Dataset.from_list(rows)


def dpo(way: Way, resume: bool = False, evaluate: bool = True, **settings: Any) -> Any:
    """A stock DPOTrainer after two steps, and what it makes of the data then."""
    import trl  # seconds, in slow tests alone

    with tempfile.TemporaryDirectory() as folder, words() as tokenizer:
        settings = dict(
            max_steps=2, per_device_train_batch_size=2, learning_rate=1e-2, report_to="none", use_cpu=True, seed=3,
            save_strategy="no", logging_steps=1, disable_tqdm=True, bf16=False, gradient_checkpointing=False,
        ) | settings  # fmt: skip
        model, args = way.lora(), trl.DPOConfig(folder, **settings)
        trainer = trl.DPOTrainer(model, args=args, train_dataset=pairs(), processing_class=tokenizer)
        trainer.train()
        if resume:
            trainer.train(resume_from_checkpoint=f"{folder}/checkpoint-1")
        losses = torch.tensor([log["loss"] for log in trainer.state.log_history if "loss" in log], dtype=F64)
        evaluated = []
        if evaluate:
            evaluated.append(trainer.evaluate(trainer.train_dataset)["eval_loss"])
            evaluated.append(trainer.predict(trainer.train_dataset).metrics["test_loss"])
    weights = torch.cat([p.detach().flatten() for p in trainer.model.parameters() if p.requires_grad])
    return losses, weights, torch.tensor(evaluated, dtype=F64)


TRAINERS: dict[str, dict[str, Any]] = {
    "plainly": {},
    "with_checkpointing": dict(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False}),
    "with_accumulation_and_clipping": dict(gradient_accumulation_steps=2, max_grad_norm=0.1),
    "auto_find_batch_size": dict(auto_find_batch_size=True),
    "resumed": dict(resume=True, save_strategy="steps", save_steps=1),
    "label_smoothing": dict(label_smoothing=0.1),
    "precomputed_reference": dict(precompute_ref_log_probs=True, evaluate=False),  # which stock TRL cannot then,
}


def trainer(name: str) -> Case:
    def run(way: Way) -> Any:
        return dpo(way, **TRAINERS[name])

    run.__name__ = f"dpo_{name}"
    return run


for _name in TRAINERS:
    case(folds=True, bound=1e-6, slow=True)(trainer(_name))


@pytest.mark.slow
def test_neftune_is_refused() -> None:
    with pytest.raises(flexpatch.UnsupportedModelError, match="NEFTune"):
        dpo(Way(True), neftune_noise_alpha=5.0)


# The test -----------------------------------------------------------------------------------------------------------


def tensors(found: Any) -> list[Tensor]:
    """All tensors of nested lists and tuples, in order."""
    if isinstance(found, Tensor):
        return [found.detach().to(F64)]
    return [tensor for each in found for tensor in tensors(each)]


def run(function: Case, patched: bool, dtype: torch.dtype) -> tuple[list[Tensor], Way]:
    way = Way(patched, dtype)
    with _Float64() if dtype == F64 and "checkpointing" not in function.__name__ else torch.enable_grad():
        return tensors(function(way)), way


def apart(one: list[Tensor], other: list[Tensor]) -> float:
    """The largest difference; infinite for other shapes."""
    if [each.shape for each in one] != [each.shape for each in other]:
        return float("inf")
    return max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True) if a.numel())


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if more["slow"] else []) for name, (_, more) in CASES.items()]
)
@pytest.mark.filterwarnings("ignore")
def test_what_people_do(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    function, expected = CASES[name]
    dtype, bound = expected["dtype"], expected["bound"]
    stock, _ = run(function, False, dtype)
    ours, way = run(function, True, dtype)
    assert stock and any(each.numel() for each in stock)
    assert (way.folded() > 0) == expected["folds"], [str(flexpatch.savings(model)) for model in way.models]
    if dtype.itemsize < 4:
        truth, _ = run(function, False, F64)
        bound = 2 * apart(stock, truth)
        ours, stock = ours, truth
    assert apart(ours, stock) <= bound, f"{apart(ours, stock):.1e} apart, {bound:.0e} allowed"
    if not expected["control"]:
        return
    if expected["folds"]:
        monkeypatch.setattr("flexpatch.fold.build_rows", lambda rows: see_siblings(build_rows(rows)))
    else:
        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", wrong_where_patched(ALL_ATTENTION_FUNCTIONS["sdpa"]))
    broken, _ = run(function, True, dtype)
    least = bound if dtype.itemsize < 4 else CONTROL * bound
    assert apart(broken, stock) > least, "a wrong patch went unnoticed"


def wrong_where_patched(attention: Callable[..., Any]) -> Callable[..., Any]:
    """Another attention, in patched models alone."""

    def wrong(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        out, weights = attention(module, *args, **kwargs)
        return -out if module.config._attn_implementation.startswith("flexpatch_") else out, weights

    return wrong
