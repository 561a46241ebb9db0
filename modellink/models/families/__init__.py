"""Families of models: rows of data over the one decoder. A new dense family is a row here and nothing else."""

from modellink.models.families import baichuan, gemma, glm, gpt, internlm, llama, qwen
from modellink.models.families.family import FAMILIES, Family

__all__ = ["FAMILIES", "Family", "baichuan", "gemma", "glm", "gpt", "internlm", "llama", "qwen"]
