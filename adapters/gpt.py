"""GPT-2 and its time: GPT-J, CodeGen, GPTBigCode, BioGPT, CTRL, OPT. Most have absolute positions."""

from flexpatch.registry import Adapter, register

ABSOLUTE = "batches padded on the left fold if they have position_ids"
ROTARY = dict(rotary_dim=8)
CERTAIN = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)

register(Adapter(name="GPT-J, CodeGen", masks="single", since="5.24", tiny={"gptj": [ROTARY], "codegen": [ROTARY]}))

register(
    Adapter(
        name="GPT-2, GPTBigCode, CTRL",
        masks="single",
        begins="position",
        since="5.24",
        tiny={"gpt2": [CERTAIN], "gpt_bigcode": [CERTAIN], "ctrl": [dict(CERTAIN, dff=96)]},
        limits=ABSOLUTE,
    )
)

register(
    Adapter(
        name="BioGPT, OPT",
        masks="single",
        restarts=False,
        begins="position",
        tiny={
            "biogpt": [dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)],
            "opt": [dict(ffn_dim=96, word_embed_proj_dim=32, attention_dropout=0.0, dropout=0.0)],
        },
        limits=ABSOLUTE,
    )
)
