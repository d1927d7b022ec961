"""Command lines that --help shows, by verb, and what it says below them."""

EXAMPLES = {
    "train": """
handgrad train
handgrad train --train mydata --preset gpt2 --micro-batch 16 --batch-tokens 524288 --lr 6e-4 --steps 5000
handgrad train --gpus 8 --train mydata --preset gpt2 --micro-batch 64 --batch-tokens 524288 --lr 6e-4 --steps 5000
handgrad train --init hf:gpt2 --lora-rank 8 --lr 2e-4 --train mydata
handgrad train --resume runs/shakespeare-001 --steps 4000
handgrad train --config runs/shakespeare-001/config.json --lr 1e-3""",
    "generate": """
handgrad generate runs/shakespeare-001 --prompt "ROMEO:" --top-k 40
handgrad generate hf:gpt2 --prompt "The meaning of life is" --temperature 0 --max-tokens 20
echo "To be" | handgrad generate model.bin --prompt -""",
    "chat": """
handgrad chat hf:HuggingFaceTB/SmolLM2-135M-Instruct
handgrad chat runs/mychats-001 --system "Be brief." --temperature 0
printf 'Hello\\nAnd then?\\n' | handgrad chat model.gguf --template chatml""",
    "embed": """
handgrad embed hf:sentence-transformers/all-MiniLM-L6-v2 sentences.txt --out sentences.npy
echo "A man is eating." | handgrad embed minilm - --pooling cls""",
    "classify": """
handgrad classify runs/reviews-001 reviews.txt""",
    "eval": """
handgrad eval runs/shakespeare-001
handgrad eval hf:gpt2 --tasks hellaswag,lambada=lambada.jsonl --limit 500""",
    "convert": """
handgrad convert runs/shakespeare-001 shakespeare-hf
handgrad convert runs/lora adapter --adapter
handgrad convert hf:gpt2 gpt2.bin --dtype bf16
handgrad convert hf:gpt2 gpt2.gguf --dtype q8_0
handgrad convert log124M mine --to handgrad""",
    "report": """
handgrad report runs/shakespeare-001
handgrad report runs/a runs/b --out compare.html""",
    "explain": """
handgrad explain gpt2 --gpu h100 --micro-batch 64 --batch-tokens 524288
handgrad explain gpt2-xl --gpu h200 --ranks 64 --nodes 8 --zero 3
handgrad explain llama3.2-1b --lora-rank 16 --gpu 4090
handgrad explain tiny --calls""",
    "profile": """
handgrad profile gpt2 --micro-batch 64 --trace step.json
handgrad profile tiny --by call""",
    "data shakespeare": "\nhandgrad data shakespeare --out plays",
    "data fineweb": "\nhandgrad data fineweb --sample 10B",
    "data fineweb-edu": "\nhandgrad data fineweb-edu --sample 10B",
    "data jsonl": "\nhandgrad data jsonl part1.jsonl part2.jsonl.gz --column text --out mydata",
    "data parquet": "\nhandgrad data parquet part1.parquet --out mydata --workers 8",
    "data labels": "\nhandgrad data labels reviews.jsonl --tokenizer bert-base-uncased --out reviews",
    "data chat": """
handgrad data chat chats.jsonl --model hf:HuggingFaceTB/SmolLM2-135M-Instruct --out mychats
handgrad data chat train.parquet --val test.parquet --model model --on-error skip
handgrad data chat chats.jsonl --model mytokens --template llama3 --show 1""",
    "data text": "\nhandgrad data text book.txt --tokenizer chars --out mydata",
    "data json": "\nhandgrad data json stories.json --column story --out mydata",
    "data tokens": "\nhandgrad data tokens train.bin --val val.bin --raw uint16 --out mydata",
    "data tokenizer": """
handgrad data tokenizer book.txt --vocab 16384 --out mytokens
handgrad data tokenizer --extend gpt2 --special '[user]' '[assistant]' --out chat-tokens""",
    "ops": """
handgrad ops
handgrad ops check attention
handgrad ops bench linear --threads 2""",
    "doctor": "\nhandgrad doctor",
    "completion": """
source <(handgrad completion bash)   # in ~/.bashrc; in ~/.zshrc with zsh
handgrad completion fish > ~/.config/fish/completions/handgrad.fish""",
}

EXAMPLES |= {f"data {word}": f"\nhandgrad data {word}" for word in ("tinystories", "openwebtext", "hellaswag", "mmlu")}
NOTES = {"train": "\n\nnames of other trainers work too, such as --max-iters for --steps: docs/other-trainers.md"}
