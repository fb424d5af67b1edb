"""What no sampler can beat on one H200: operations and bytes of its forward passes over the chip's speed (bf16 weights).
And the operations of an RL update.

T columns computed, S columns attended to, R columns that the head scores; all per row of a batch.
"""

H200_FLOPS = 790e12  # bf16 matrix products, as achieved by large ones
H200_BYTES_PER_SECOND = 4.8e12
BYTES = 2  # of a bf16 number


def body_parameters(config):
    """The weights that every column is multiplied with: all blocks, without embedding, head and norms."""
    key_width = config.width // config.heads * config.kv_heads
    block = 2 * config.width**2 + 2 * config.width * key_width + 3 * config.width * config.mlp_width
    return config.layers * block


def head_parameters(config):
    return config.width * config.vocab_size


def forward_flops(config, computed, attended, scored):
    """F(T, S, R) = 2 body T + 4 S width T layers + 2 head R."""
    attention = 4 * attended * config.width * computed * config.layers
    return 2 * body_parameters(config) * computed + attention + 2 * head_parameters(config) * scored


def forward_seconds(config, batch, computed, attended, scored):
    """The longer of computing, and reading all weights once and the keys and values of every row."""
    key_width = config.width // config.heads * config.kv_heads
    keys = batch * attended * BYTES * 2 * key_width * config.layers
    moved = BYTES * (body_parameters(config) + head_parameters(config)) + keys
    return max(batch * forward_flops(config, computed, attended, scored) / H200_FLOPS, moved / H200_BYTES_PER_SECOND)


def passes(prompt, new, steps, block, cache):
    """(T, S, R) of every forward pass. A cache is made by a full pass at the start of each block."""
    total, blocks = prompt + new, new // block
    full, each = (total, total, block), steps // blocks
    if cache == "none":
        return [full] * steps
    windows = [block if cache == "dual" else new - index * block for index in range(blocks)]
    return [shape for window in windows for shape in [full] + [(window, total, block)] * (each - 1)]


def sampling_flops(config, batch, prompt, new, steps, block, cache):
    return batch * sum(forward_flops(config, *shape) for shape in passes(prompt, new, steps, block, cache))


def sampling_seconds(config, batch, prompt, new, steps, block, cache):
    return sum(forward_seconds(config, batch, *shape) for shape in passes(prompt, new, steps, block, cache))


def update_flops(config, rows, prompt, completion, inner_updates, scorings):
    """Matrix products of `scorings` forward passes without a gradient, and of inner_updates with one (three times a forward pass).

    What is computed a second time to save memory does not count: nobody has to.
    """
    forward = forward_flops(config, prompt + completion, prompt + completion, completion)
    return rows * (scorings + 3 * inner_updates) * forward
