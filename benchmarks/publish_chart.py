"""What does the picture of the README and the site show? How many times as fast as plain PyTorch, by operator and model."""

from publish_rows import DTYPES, ratio, rows_of, threads_of

# A label, the benchmark, and its case. What a run did not measure is left out.
CHART = [
    ("layer_norm + residual, 512 rows of 768", "layer_norm", "512x768 residual"),
    ("rms_norm + residual, 512 rows of 768", "rms_norm", "512x768 residual"),
    ("attention, 512 tokens", "attention", "1x12x512x64"),
    ("attention, causal", "attention", "1x12x512x64 causal"),
    ("attention, T5's bias", "attention", "1x12x512x64 T5 bias"),
    ("attention, half of it padding", "attention", "1x12x512x64 half padding"),
    ("attention, forward and backward", "attention", "train 1x12x512x64"),
    ("linear 768 to 50257, 1 row", "linear", "1x768 -> 50257"),
    ("ffn, 16 rows", "ffn", "16x768x3072"),
    ("ffn, 512 rows", "ffn", "512x768x3072"),
    ("gated_ffn, 512 rows", "gated_ffn", "512x768x2048"),
    ("fourier_mix 2x512x768", "fourier_mix", "2x512x768"),
    ("GPT-2 124M, a prompt of 128", "gpt2", "prompt of 128"),
    ("GPT-2 124M, a token", "gpt2", "token, 160 cached"),
    ("T5 base, encoder", "t5", "encoder, 512 tokens"),
    ("T5 base, a token", "t5", "token, 32 cached, source of 128"),
    ("ALBERT base, half padding", "albert", "8x128, half padding, skip_padding"),
    ("FNet base", "fnet", "2x512"),
]


def charted(found: dict) -> list[tuple[str, dict[str, dict]]]:
    """(label, {dtype: row}) of what CHART has and this run measured."""
    lines = []
    for label, benchmark, case in CHART:
        table = rows_of(found, benchmark)
        by_dtype = {dtype: table[case, dtype] for dtype in DTYPES[:2] if ratio(table.get((case, dtype))) != "-"}
        lines.append((label, by_dtype))
    return lines


def chart(found: dict) -> str:
    """An SVG of bars: how many times as fast as plain PyTorch. Made without a library, so that the same results give the same
    bytes."""
    longest, left, right, bar = 6.0, 250, 640, 13
    colours = {"float32": "#1f6fb4", "bfloat16": "#c05a28"}

    def x(value: float) -> float:
        return left + (right - left) * min(value, longest) / longest

    def text(at: float, y: float, words: str, extra: str = "") -> str:
        return f'<text x="{at:.1f}" y="{y:.1f}" {extra}>{words}</text>'

    y, body = 52.0, []
    for label, by_dtype in charted(found):
        if not by_dtype:
            continue
        height = bar * len(by_dtype)
        body.append(text(left - 8, y + height / 2 + 4, label, 'text-anchor="end"'))
        for dtype, row in by_dtype.items():
            value = row["ratio"][row["baseline"]]
            width = x(value) - left
            body.append(
                f'<rect x="{left}" y="{y:.1f}" width="{width:.1f}" height="{bar - 2}" fill="{colours[dtype]}"/>'
            )
            body.append(text(x(value) + 4, y + bar - 4, ratio(row), 'font-size="10"'))
            y += bar
        y += 8
    line = f'<line x1="{x(1):.1f}" x2="{x(1):.1f}" y1="46" y2="{y:.1f}" stroke="#222" stroke-dasharray="3 2"/>'
    heading = f"Times as fast as plain PyTorch: {found['kind']}, {threads_of(found)}, {found['date']}"
    legend = [
        f'<rect x="{left + 110 * i}" y="28" width="10" height="10" fill="{colour}"/>'
        + text(left + 14 + 110 * i, 37, dtype)
        for i, (dtype, colour) in enumerate(colours.items())
    ]
    below = text(x(1), y + 14, "plain PyTorch", 'text-anchor="middle"')
    below += "".join(text(x(value), y + 14, str(value), 'text-anchor="middle"') for value in range(2, int(longest) + 1))
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="700" height="{y + 24:.0f}" viewBox="0 0 700 {y + 24:.0f}" '
            'font-family="sans-serif" font-size="12" fill="#222">',
            '<rect width="100%" height="100%" fill="#fff"/>',
            text(8, 18, heading, 'font-size="13" font-weight="bold"'),
            *legend,
            *body,
            line,
            below,
            "</svg>\n",
        ]
    )
