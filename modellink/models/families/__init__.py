"""Families of models: rows of data over the one decoder. A new family is a row here and nothing else."""

from modellink.models.families import baichuan, deepseek, gemma, glm, gpt, gpt_oss, grok, internlm, llama, qwen
from modellink.models.families.family import FAMILIES, Family

__all__ = ["FAMILIES", "Family", "baichuan", "deepseek", "gemma", "glm", "gpt", "gpt_oss", "grok", "internlm"]
__all__ += ["llama", "qwen"]
