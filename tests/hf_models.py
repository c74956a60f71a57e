"""Tiny Hugging Face models with random weights, in local folders."""

import tokenizers
import torch
import transformers as hf
from tokenizers import models, pre_tokenizers, processors, trainers

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(45))]


def save_bert(folder, seed=0, layers=2):
    """A masked language model, and a tokenizer for which `w7` is a word."""
    torch.manual_seed(seed)
    small = {"hidden_size": 16, "num_hidden_layers": layers, "num_attention_heads": 2, "intermediate_size": 32}
    config = hf.BertConfig(vocab_size=50, max_position_embeddings=32, **small)
    hf.BertForMaskedLM(config).save_pretrained(folder)
    words = tokenizers.Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    hf.PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)
    return str(folder)


def save_bert_for(texts, folder):
    """A masked language model, 64 wide, and a tokenizer trained on some texts."""
    torch.manual_seed(0)
    pairs = tokenizers.Tokenizer(models.BPE())
    pairs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    settings = {"vocab_size": 2000, "special_tokens": WORDS[:5], "initial_alphabet": alphabet, "show_progress": False}
    pairs.train_from_iterator(texts, trainers.BpeTrainer(**settings))
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    hf.PreTrainedTokenizerFast(tokenizer_object=pairs, **special).save_pretrained(folder)
    small = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    hf.BertForMaskedLM(hf.BertConfig(vocab_size=2000, max_position_embeddings=64, **small)).save_pretrained(folder)
    return str(folder)


def save_gpt2(folder, vocab_size=50):
    torch.manual_seed(0)
    tokens = {"bos_token_id": 0, "eos_token_id": 0}
    config = hf.GPT2Config(vocab_size=vocab_size, n_positions=32, n_embd=16, n_layer=2, n_head=2, **tokens)
    hf.GPT2LMHeadModel(config).save_pretrained(folder)
    return str(folder)


def save_t5(folder):
    torch.manual_seed(0)
    shape = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    hf.T5ForConditionalGeneration(hf.T5Config(vocab_size=50, decoder_start_token_id=0, **shape)).save_pretrained(folder)
    return str(folder)


def save_bart(folder, seed=0):
    """A sequence-to-sequence model that makes other words of other words, with a tokenizer as that of `save_bert`."""
    save_bert(folder)
    torch.manual_seed(seed)
    shape = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "init_std": 1.0}
    tokens = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "decoder_start_token_id": 3}
    config = hf.BartConfig(vocab_size=50, max_position_embeddings=32, forced_eos_token_id=3, **shape, **heads, **tokens)
    hf.BartForConditionalGeneration(config).save_pretrained(folder)
    return str(folder)
