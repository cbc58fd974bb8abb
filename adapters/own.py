"""Models whose attention is their own, out of transformers' registry: BLOOM, MPT, Falcon, GPT-Neo and their time."""

from typing import Any

from flexpatch.registry import Adapter, Visible, causal, no_mask, register

ABSOLUTE = "batches padded on the left fold if they have position_ids"
GIVEN = "batches padded on the left run as they are given"
OWN: dict[str, Any] = dict(masks="own", since="5.24")
EAGER = OWN | dict(implementations=("eager",))
# Their forwards ignore positions, or count them without looking at any.
UNPOSITIONED = EAGER | dict(restarts=False)


def alibi(module: Any) -> Visible:
    """BLOOM hands each layer a bias of keys."""
    return Visible(keys=("alibi",))


def alibi_in_mask(module: Any) -> Visible:
    """Falcon hands it so, and in its mask."""
    return Visible(keys=("alibi", "attention_mask"))


def last_keys(module: Any) -> Visible:
    """MPT takes the last keys of a bias for its longest sequence, and masks that are True where keys are hidden."""
    return Visible(hides=True, whole=("position_bias",))


def at_random(rate: float) -> str | None:
    """Refuse layers that are left out at random: all mixers of a row must run."""
    return f"layerdrop {rate} leaves layers out at random. Set it to 0.0 before the model is built" if rate else None


register(
    Adapter(
        name="BLOOM",
        **UNPOSITIONED,
        unshared={"BloomAttention": alibi},
        padding="in_front",
        tiny={"bloom": [{}, dict(num_attention_heads=8, apply_residual_connection_post_layernorm=True)]},
    )
)

register(
    Adapter(
        name="MPT",
        **UNPOSITIONED,
        unshared={"MptAttention": last_keys},
        padding="in_front",
        tiny={"mpt": [dict(max_seq_len=512)]},
    )
)

FALCON = dict(num_kv_heads=2, ffn_hidden_size=96)

register(
    Adapter(
        name="Falcon",
        **OWN,
        unshared={"FalconAttention": alibi_in_mask},
        tiny={
            "falcon": [
                FALCON,
                dict(FALCON, new_decoder_architecture=True),
                dict(FALCON, num_kv_heads=4, alibi=True, multi_query=False, parallel_attn=False, bias=True),
            ]
        },
        limits=GIVEN,
    )
)

register(
    Adapter(
        name="GPT-Neo",
        **EAGER,
        # Windows of local layers are the module's own.
        unshared={"GPTNeoSelfAttention": causal},
        begins="position",
        padding="in_front",
        tiny={"gpt_neo": [dict(attention_types=[[["global", "local"], 2]], window_size=8)]},
        limits=ABSOLUTE,
    )
)

register(
    Adapter(
        name="GPT-NeoX-Japanese",
        **EAGER,
        unshared={"GPTNeoXJapaneseAttention": causal},
        padding="masked",
        tiny={"gpt_neox_japanese": [dict(attention_dropout=0.0, intermediate_multiple_size=2)]},
        limits="load it with attention_dropout=0.0",
    )
)

register(
    Adapter(
        name="GPT",
        **UNPOSITIONED,
        unshared={"Attention": causal},
        begins="position",
        padding="masked",
        tiny={"openai-gpt": [dict(attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)]},
        limits=ABSOLUTE,
    )
)

register(
    Adapter(
        name="XGLM",
        **UNPOSITIONED,
        unshared={"XGLMAttention": causal},
        reject=lambda config: at_random(config.layerdrop),
        begins="position",
        padding="masked",
        tiny={"xglm": [dict(ffn_dim=96, attention_dropout=0.0, dropout=0.0)]},
        limits=f"load it with attention_dropout=0.0, dropout=0.0; {ABSOLUTE}",
    )
)

register(
    Adapter(
        name="TrOCR (decoder)",
        **UNPOSITIONED,
        # Positions are counted in the row, which no argument changes.
        unshared={
            "TrOCRAttention": causal,
            "TrOCRLearnedPositionalEmbedding": no_mask,
            "TrOCRSinusoidalPositionalEmbedding": no_mask,
        },
        reject=lambda config: at_random(config.decoder_layerdrop),
        begins="column",
        tiny={
            "trocr": [
                dict(decoder_ffn_dim=96, dropout=0.0, cross_attention_hidden_size=64),
                dict(
                    decoder_ffn_dim=96,
                    dropout=0.0,
                    cross_attention_hidden_size=64,
                    use_learned_position_embeddings=False,
                ),
            ]
        },
        limits=f"calls with an encoder's output run as they are given; {GIVEN}",
    )
)
