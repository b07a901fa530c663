"""What an untrained memory takes off the perplexity of any base: the same texts for all, one reading each.

    python runs/untrained.py --bases smollm2-135m FOLDER --data DATA [--tokens 8192] [--memory untrained]

Each document is read once from an empty memory; the log-probability of each token under the base, with the same window
and no memory, comes from the same reading. DATA holds `wikitext-2-raw` and `public-domain-novels`. Code is that of this
package, the log and the JSON are made here; other texts are named by --chat and --chinese.
Prints a line a document, and a table with a 95 % bootstrap interval over documents.
"""

import argparse
import datetime
import json
import random
from pathlib import Path

import torch

import hippoformer
from hippoformer.data.documents import read_documents
from hippoformer.text import encode

RESAMPLES = 10_000


def log_file(lines: int = 900, seed: int = 3) -> str:
    """A log of five services: times, traces, numbers, and now and then the same stack trace."""
    draw, time, written = random.Random(seed), datetime.datetime(2026, 10, 9, 23, 58, 1), []
    services = ("billing.OrderService", "checkout.PaymentClient", "inventory.StockRepository", "gateway.RateLimiter")
    for _ in range(lines):
        time += datetime.timedelta(milliseconds=draw.expovariate(0.002))
        messages = (
            ("INFO", f"order {draw.randrange(10**6, 10**7)} accepted, total={draw.uniform(3, 900):.2f} EUR"),
            ("WARN", f"retrying https://payments.internal/v2/charge (attempt {draw.randrange(1, 4)}/3)"),
            ("INFO", f"reserved {draw.randrange(1, 9)} units of sku=SKU-{draw.randrange(10_000, 99_999)}"),
            ("INFO", f"GET /api/orders/{draw.randrange(10**6, 10**7)} 200 {draw.randrange(2, 600)}ms"),
            (
                "ERROR",
                "java.net.SocketTimeoutException: Read timed out\n\tat com.example.Client.charge(Client.java:88)",
            ),
        )
        level, message = draw.choice(messages)
        trace = f"{draw.getrandbits(64):016x}"
        written.append(f"{time:%Y-%m-%d %H:%M:%S} {level:5} [{trace}] c.e.{draw.choice(services)} : {message}")
    return "\n".join(written)


def minified_json(orders: int = 500, seed: int = 5) -> str:
    """Orders of a shop, without white space."""
    draw = random.Random(seed)

    def item() -> dict[str, object]:
        return {"sku": f"A{draw.randrange(9999):04d}", "qty": draw.randrange(1, 9), "price": draw.randrange(999) / 10}

    made = [
        {
            "id": draw.getrandbits(31),
            "city": draw.choice(("Oslo", "Lyon", "Turin", "Ghent")),
            "items": [item() for _ in range(draw.randrange(1, 5))],
            "status": draw.choice(("paid", "open", "shipped")),
        }
        for _ in range(orders)
    ]
    return json.dumps({"orders": made}, separators=(",", ":"))


def conversation(file: Path) -> str:
    """A LoCoMo conversation, a line a turn."""
    turns = (turn for session in json.loads(file.read_text(encoding="utf-8"))["sessions"] for turn in session["turns"])
    return "\n".join(f"{turn['speaker']}: {turn['text']}" for turn in turns)


def texts(options: argparse.Namespace) -> dict[str, list[str]]:
    """Kind of text -> documents."""
    articles = read_documents(options.data / "wikitext-2-raw" / "wiki.test.raw")[: options.articles]
    novels = sorted((options.data / "public-domain-novels" / "test").glob("*.txt"))
    sources = sorted(Path(hippoformer.__file__).parent.glob("hippocampus/*.py"))
    found = {
        "articles": [article.text for article in articles],
        "novels": [novel.read_text(encoding="utf-8") for novel in novels],
        "code": ["".join(source.read_text(encoding="utf-8") for source in sources)],
        "log": [log_file()],
        "json": [minified_json()],
    }
    found |= {"chat": [conversation(options.chat)]} if options.chat else {}
    return found | ({"chinese": [options.chinese.read_text(encoding="utf-8")]} if options.chinese else {})


@torch.no_grad()
def read(model: hippoformer.HippoFormer, ids: torch.Tensor) -> tuple[int, float, float]:
    """Tokens that are predicted, and their -log p summed: of the base, and with memory."""
    base = fused = 0.0
    for step in model.stream(ids, [ids.shape[1]], model.new_cache()):
        base -= float(step.base_log_prob.double().sum())
        fused -= float(step.target_log_prob.double().sum())
    return ids.shape[1] - 1, base, fused


def change(scores: torch.Tensor) -> torch.Tensor:
    """(..., N, 3) of N documents as `read` gives them -> (...,) change of perplexity, in per cent."""
    tokens, base, fused = scores.sum(-2).unbind(-1)
    return 100 * torch.expm1((fused - base) / tokens)


def main() -> None:
    """See the head of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bases", nargs="+", default=["smollm2-135m"])
    parser.add_argument("--memory", default="untrained")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--chat", type=Path)
    parser.add_argument("--chinese", type=Path)
    parser.add_argument("--articles", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=8192)
    options = parser.parse_args()
    for name in options.bases:
        model, tokenizer = hippoformer.load(name, memory=options.memory, dtype=torch.float32)
        rows = []
        for kind, documents in texts(options).items():
            scores = []
            for number, document in enumerate(documents):
                ids = encode(tokenizer, document, bos=True)[:, : options.tokens]
                scores.append(read(model, ids))
                print(
                    f"{name} {kind} {number}: {ids.shape[1]} tokens, {change(torch.tensor(scores[-1:])):+.2f} %",
                    flush=True,
                )
            each = torch.tensor(scores, dtype=torch.float64)
            drawn = torch.randint(len(each), (RESAMPLES, len(each)), generator=torch.Generator().manual_seed(0))
            low, high = change(each[drawn]).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
            worst = max(float(change(one.unsqueeze(0))) for one in each)
            rows.append(f"| {kind} | {len(each)} | {change(each):+.2f} [{low:.2f}, {high:.2f}] % | {worst:+.2f} % |")
        print(
            f"\n{name}, memory {model.memory}\n\n| text | documents | perplexity | worst |\n| --- | --- | --- | --- |"
        )
        print("\n".join(rows), flush=True)


if __name__ == "__main__":
    main()
