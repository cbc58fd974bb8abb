"""Causal language model classes of transformers that cannot share prefixes, each with the reason."""

from flexpatch.registry import Adapter, register

ENCODER = (
    "is an encoder, whose tokens see later ones (config.is_decoder is False, and its checkpoints are trained so): a "
    "prompt changes with its answer, so nothing can be shared. Train it unpatched"
)
BOTH_SIDES = (
    "lets tokens see later ones: a prompt changes with its answer, so nothing can be shared. Train it unpatched"
)
HASHES = (
    "draws random hashes in every call, which sort tokens of the whole call into buckets, so answers would share one "
    "draw. Train it unpatched"
)
DRAFT = (
    "drafts tokens for another model, whose cache and hidden states each of its calls takes: it has no sequences of "
    "its own. Train it unpatched"
)
PATCHES = (
    "cuts bytes into patches, and embeds groups of bytes, in its backbone's own forward: all of it would have to run "
    "on separate sequences, so nothing can be shared. Train it unpatched"
)

ENCODERS = (
    *("bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert"),
    *("rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl", "xmod"),
)

register(
    Adapter(
        name="Refused",
        masks="single",
        tiny={},
        refused=dict.fromkeys(ENCODERS, ENCODER)
        | dict.fromkeys(("xlm", "xlnet", "cpmant"), BOTH_SIDES)
        | dict.fromkeys(("gemma4_assistant", "gemma4_unified_assistant"), DRAFT)
        | {"reformer": HASHES, "blt": PATCHES},
    )
)
