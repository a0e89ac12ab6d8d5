"""A tiny language model with random weights that a real llama.cpp loads and speaks from: below 1 MB.

    python tests/real/tiny_model.py PATH [PARTS]

It answers printable ASCII nonsense, the same for the same seed at temperature 0. When sampling, an answer ends
by itself after some hundred tokens, or at max_tokens. Needs the packages gguf and numpy (imported only here)."""

import string
import sys
from pathlib import Path

CHAT_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message['role'] }}
{{ message['content'] }}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}"""

START, END = "<|im_start|>", "<|im_end|>"
SPOKEN = (string.ascii_lowercase + " .,").encode()
# Dimension 0 of the residual stream is constant, so a token's weight there is a bias on its logit.
BIAS_NEVER, BIAS_END, BIAS_SPACE = -60.0, -6.0, 2.5


def write_tiny_model(path, layers=4, heads=4, kv_heads=2, head_dim=16, feed_forward=128, context=4096, seed=1,
                     name="tiny", ends=True):
    """Writes a GGUF of the llama architecture with a byte-level tokenizer. Returns the path.

    ends=False: an answer never ends before max_tokens. More layers make it slower: with 4 it says some
    thousands of tokens a second on one core, with 64 about 150, with 256 (38 MB) about 30."""
    import gguf
    writer = gguf.GGUFWriter(str(path), "llama")
    width = heads * head_dim
    writer.add_name(name)
    writer.add_block_count(layers)
    writer.add_context_length(context)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(feed_forward)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(head_dim)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    tokens = add_tokenizer(writer)
    writer.add_vocab_size(len(tokens))
    for tensor, values in weights(tokens, layers, width, kv_heads * head_dim, feed_forward, seed, ends):
        writer.add_tensor(tensor, values)
    return write(writer, path)


def split_model(path, parts):
    """Writes PREFIX-00001-of-0000N.gguf … beside a model, as big models come. Returns their paths in order."""
    import gguf
    reader = gguf.GGUFReader(str(path))
    per_part = -(-len(reader.tensors) // parts)
    writer = gguf.GGUFWriter(str(path), "llama", split_max_tensors=per_part)
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            array = field.types[0] == gguf.GGUFValueType.ARRAY
            writer.add_key_value(field.name, field.contents(), field.types[0], field.types[-1] if array else None)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data)
    write(writer, path)
    stem = str(path)[:-len(".gguf")]
    return [Path("%s-%05d-of-%05d.gguf" % (stem, part, parts)) for part in range(1, parts + 1)]


def write(writer, path):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Path(path)


# The tokenizer -----------------------------------------------------------------------------------

def add_tokenizer(writer):
    """One token a byte, written as GPT-2 writes bytes, one merge (the format demands some), two marks."""
    import gguf
    tokens = byte_names() + [byte_names()[ord("t")] + byte_names()[ord("h")], START, END]
    marks = [gguf.TokenType.CONTROL] * 2
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.NORMAL] * (len(tokens) - 2) + marks)
    writer.add_token_merges(["t h"])
    writer.add_bos_token_id(tokens.index(START))
    writer.add_eos_token_id(tokens.index(END))
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)
    return tokens


def byte_names():
    """GPT-2's printable stand-in for each of the 256 bytes, in order of the bytes."""
    printable = list(range(33, 127)) + list(range(161, 173)) + list(range(174, 256))
    others = [byte for byte in range(256) if byte not in printable]
    names = {byte: chr(byte) for byte in printable}
    names.update({byte: chr(256 + number) for number, byte in enumerate(others)})
    return [names[byte] for byte in range(256)]


# The weights -------------------------------------------------------------------------------------

def weights(tokens, layers, width, kv_width, feed_forward, seed, ends):
    """(name, values) of every tensor. Nothing writes to dimension 0 of the residual stream."""
    import numpy
    random = numpy.random.default_rng(seed)

    def matrix(rows, columns):
        return (random.standard_normal((rows, columns)) / columns ** 0.5).astype(numpy.float32)

    def silent_in_0(values):
        values[0] = 0
        return values * numpy.float32(min(1, 4 / layers) ** 0.5)     # else many layers drown dimension 0

    ones = numpy.ones(width, dtype=numpy.float32)
    embedding = matrix(len(tokens), width) * width ** 0.5
    embedding[:, 0] = 1
    yield "token_embd.weight", embedding
    for layer in range(layers):
        block = "blk.%d." % layer
        yield block + "attn_norm.weight", ones
        yield block + "attn_q.weight", matrix(width, width)
        yield block + "attn_k.weight", matrix(kv_width, width)
        yield block + "attn_v.weight", matrix(kv_width, width)
        yield block + "attn_output.weight", silent_in_0(matrix(width, width))
        yield block + "ffn_norm.weight", ones
        yield block + "ffn_gate.weight", matrix(feed_forward, width)
        yield block + "ffn_up.weight", matrix(feed_forward, width)
        yield block + "ffn_down.weight", silent_in_0(matrix(width, feed_forward))
    yield "output_norm.weight", ones
    output = matrix(len(tokens), width) * 2
    output[:, 0] = BIAS_NEVER
    for byte in SPOKEN:
        output[byte, 0] = BIAS_SPACE if byte == ord(" ") else 0
    output[tokens.index(END), 0] = BIAS_END if ends else BIAS_NEVER
    yield "output.weight", output


if __name__ == "__main__":
    print(write_tiny_model(sys.argv[1]))
    for part in split_model(sys.argv[1], int(sys.argv[2])) if len(sys.argv) > 2 else []:
        print(part)
