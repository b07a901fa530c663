"""Text that knows where its documents end: from files and folders, and from Hugging Face datasets."""

from hippoformer.data.datasets import benchmark_documents, dataset_documents
from hippoformer.data.documents import Document, read_documents, split_lines

__all__ = ["Document", "benchmark_documents", "dataset_documents", "read_documents", "split_lines"]
