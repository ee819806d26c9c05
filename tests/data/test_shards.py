import pickle

import pytest
import torch

from spectral_lightning.data.shards import ShardWriter, TokenShard


@pytest.fixture
def make_shard(tmp_path):
    def make(documents, vocab_size=300):
        token_bytes = torch.ones(vocab_size, dtype=torch.int64)
        with ShardWriter(tmp_path / "a.bin", token_bytes) as writer:
            for document in documents:
                assert writer.append(document) == len(document)
            return TokenShard(tmp_path / "a.bin", info_after_closing(writer))

    def info_after_closing(writer):
        writer.__exit__()
        return writer.info()

    return make


@pytest.mark.parametrize(("vocab_size", "width"), [(300, 2), (65_536, 2), (65_537, 4)])
def test_tokens_are_read_back_and_stored_as_narrow_as_possible(make_shard, vocab_size, width):
    shard = make_shard([[1, 2, vocab_size - 1], [4]], vocab_size)
    tokens = shard.read(1, 4)
    assert tokens.tolist() == [2, vocab_size - 1, 4]
    assert tokens.dtype == torch.int64
    assert shard.path.stat().st_size == 4 * width
    assert (len(shard), shard.info.num_documents, shard.info.num_bytes) == (4, 2, 4)


def test_worker_opens_the_file_itself(make_shard):
    shard = make_shard([list(range(290))] * 50)
    shard.read(0, 1)
    sent = pickle.dumps(shard)
    assert len(sent) < 1_000
    assert pickle.loads(sent).read(290, 292).tolist() == [0, 1]


def test_file_of_another_size_is_refused(make_shard):
    shard = make_shard([[1, 2, 3]])
    shard.path.write_bytes(b"12345678")
    with pytest.raises(ValueError, match=r"The token shard is damaged: .* 8 bytes instead of 6"):
        TokenShard(shard.path, shard.info)


def test_deep_check_reads_the_content(make_shard):
    shard = make_shard([[1, 2, 3]])
    assert shard.damage(deep=True) is None
    shard.path.write_bytes(b"123456")
    assert shard.damage(deep=False) is None
    assert "does not match its checksum" in shard.damage(deep=True)
