# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.4", "transformers>=5.15,<6", "peft>=0.20,<1", "bitsandbytes>=0.46", "accelerate"]
# ///
"""Ask the fine-tuned model a question: `uv run ask.py "What are the treatments for asthma?"`.

Not medical advice. Nothing of this project is imported: one file, plain PEFT, an environment that uv makes.
On a CPU with AVX512-BF16 bitsandbytes multiplies in bfloat16: the words can differ from the evaluated ones.
"""

import argparse
from pathlib import Path

STUDY = Path(__file__).parent / "assets" / "adapters" / "smollm2-135m" / "exp_005"
TEMPLATE = "### Instruction:\n{}\n\n### Response:\n"  # the prompt of its training

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("question")
parser.add_argument("--adapter", default=str(STUDY), help="folder or OWNER/NAME on the Hub; default: exp_005")
parser.add_argument("--base", help="folder or Hub name of its base model; default: the one that it names")
parser.add_argument("--tokens", type=int, default=200, help="longest answer")
options = parser.parse_args()

from peft import PeftConfig, PeftModel  # noqa: E402, after the arguments: --help takes no time
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    TextStreamer,
)

base = options.base or PeftConfig.from_pretrained(options.adapter).base_model_name_or_path
nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
model = AutoModelForCausalLM.from_pretrained(base, quantization_config=nf4)
model = PeftModel.from_pretrained(model, options.adapter).eval()
tokenizer = AutoTokenizer.from_pretrained(base)
prompt = tokenizer(TEMPLATE.format(options.question.strip()), return_tensors="pt").to(model.device)
model.generate(**prompt, max_new_tokens=options.tokens, do_sample=False,
               streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True))
