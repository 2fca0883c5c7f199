"""Which test files run with an older transformers, and which of their tests are left out there, for which reason?"""

HERE = "tests/integrations/"
FILES = {
    "4.57.6": (
        "test_fused_gpt2.py",
        "test_fused_t5.py",
        "test_fused_albert.py",
        "test_fused_fnet.py",
        "test_decode_step.py",
    ),
}

# Reason -> the tests, by file and name. A name stands for all its cases.
LEFT_OUT = {
    "4.57.6": {
        "the layers have no config, and no interface": (
            "test_fused_t5.py::test_report",
            "test_fused_albert.py::test_report",
        ),
        "T5 in float64 gives NaN to rows that see no key": (
            *(f"test_fused_t5.py::test_padding_and_dtypes[dtype{i}-left]" for i in range(3)),
            *(f"test_fused_t5.py::test_caches[left-{kind}]" for kind in ("dynamic", "static")),
        ),
        "sdpa ignores GPT-2's scales, which the eager truth has; fuse_ leaves these layers": (
            "test_decode_step.py::test_generate[gpt2, other options",
            "test_decode_step.py::test_the_tolerance_rule[gpt2, other options",
        ),
        "the report has the attention layers, which tell the interface that weights are wanted": (
            "test_fused_gpt2.py::test_what_is_replaced",
        ),
        "each layer gets its own head mask, so it is honoured": (
            "test_fused_gpt2.py::test_head_mask_is_refused_beside_cross_attention",
        ),
        "a step on a StaticCache runs the modules": (
            *(
                f"test_decode_step.py::test_generate[{model}-{padding}static cache]"
                for model in ("gpt2", "t5", "t5 gated")
                for padding in ("", "left padding, ")
            ),
            "test_decode_step.py::test_a_static_cache_is_filled_to_its_end",
        ),
        "ALBERT's layers collect hidden states otherwise, and take no tuple's second place for granted": (
            "test_fused_albert.py::test_heads",
            "test_fused_albert.py::test_children_replaced_or_hooked_later[attention]",
            "test_fused_albert.py::test_dropout",
        ),
    },
}


def files(release):
    """The test files for a release, all of them for the installed one."""
    return [HERE + name for name in FILES.get(release, ())] if release != "installed" else [HERE]


def tests(release):
    """The tests to leave out, as pytest names them."""
    return [HERE + test for group in LEFT_OUT.get(release, {}).values() for test in group]
