import torch

from transfgu_ray.algorithms.rounds.segmenter import Classifier, MaskTransformer


def _decoder(num_classes=5, dropout=0.0, seed=0, **settings):
    torch.manual_seed(seed)
    return MaskTransformer(num_classes, 24, num_layers=2, num_heads=3, dropout=dropout, **settings).eval()


def _tokens(b=2, n=12):
    return torch.randn(b, n, 24, generator=torch.Generator().manual_seed(5))


def test_mask_transformer__class_embeddings_start_orthogonal_where_asked():
    embeddings = _decoder(num_classes=7, class_init="orthogonal").cls_emb[0]
    torch.testing.assert_close(embeddings @ embeddings.T, torch.eye(7), rtol=0, atol=1e-5)


def test_mask_transformer__class_embeddings_start_with_a_length_of_1_together():
    embeddings = _decoder(num_classes=7).cls_emb[0]
    torch.testing.assert_close(embeddings.norm(), torch.tensor(1.0))
    assert (embeddings.norm(dim=1) - 7**-0.5).abs().max() < 0.15
    assert (embeddings @ embeddings.T).fill_diagonal_(0).abs().max() > 1e-3


def test_mask_transformer__has_the_weights_of_the_published_decoder():
    names = set(_decoder().state_dict())
    assert not any(name.endswith("qkv.bias") for name in names)
    # Version 0.1 had biases there.
    assert {f"blocks.{i}.attn.qkv.bias" for i in range(2)} == set(_decoder(qkv_bias=True).state_dict()) - names


def test_mask_transformer__dropout_reaches_the_attention():
    decoder = _decoder(dropout=0.5)
    assert {block.attn.attn_drop.p for block in decoder.blocks} == {0.5}


def test_mask_transformer__more_classes_than_dimensions():
    logits, classes = _decoder(num_classes=40)(_tokens(), (3, 4))
    assert logits.shape == (2, 40, 3, 4)
    assert classes.shape == (2, 40, 24)


def test_mask_transformer__logits_are_normalised_cosines():
    decoder = _decoder()
    with torch.no_grad():
        logits, classes = decoder(_tokens(), (3, 4))
        # Equation 2 written out with plain products, one image and one patch at a time.
        tokens = torch.cat([decoder.proj_dec(_tokens()), decoder.cls_emb.expand(2, -1, -1)], 1)
        tokens = decoder.decoder_norm(decoder.blocks[1](decoder.blocks[0](tokens)))
        for image in range(2):
            rows = tokens[image, 12:] @ decoder.proj_classes
            rows = rows / rows.norm(dim=1, keepdim=True)
            torch.testing.assert_close(classes[image], rows)
            for patch in range(12):
                column = tokens[image, patch] @ decoder.proj_patch
                cosines = rows @ (column / column.norm())
                assert cosines.abs().max() <= 1 + 1e-5
                want = (cosines - cosines.mean()) / (cosines.var(unbiased=False) + 1e-5).sqrt()
                torch.testing.assert_close(logits[image, :, patch // 4, patch % 4], want, rtol=1e-3, atol=1e-4)


def test_mask_transformer__permuting_class_embeddings_permutes_maps():
    decoder, order = _decoder(), torch.tensor([2, 4, 0, 1, 3])
    with torch.no_grad():
        plain, _ = decoder(_tokens(), (3, 4))
        decoder.cls_emb.copy_(decoder.cls_emb[:, order])
        permuted, _ = decoder(_tokens(), (3, 4))
    torch.testing.assert_close(permuted, plain[:, order], rtol=1e-4, atol=1e-4)


def test_mask_transformer__dropout_only_while_training():
    decoder = _decoder(dropout=0.5)
    once, again = decoder(_tokens(), (3, 4))[0], decoder(_tokens(), (3, 4))[0]
    assert torch.equal(once, again)
    decoder.train()
    assert not torch.equal(decoder(_tokens(), (3, 4))[0], once)


def test_mask_transformer__gradient_reaches_every_weight():
    decoder = _decoder()
    logits, classes = decoder(_tokens(), (3, 4))
    (logits.square().sum() * logits[0, 0, 0, 0] + classes.sum()).backward()
    assert [name for name, weight in decoder.named_parameters() if weight.grad is None] == []


def test_classifier__is_a_1x1_convolution():
    torch.manual_seed(0)
    classifier, tokens = Classifier(5, 24), _tokens()
    logits, classes = classifier(tokens, (3, 4))
    maps = tokens.transpose(1, 2).reshape(2, 24, 3, 4)
    want = torch.nn.functional.conv2d(maps, classifier.head.weight[:, :, None, None], classifier.head.bias)
    torch.testing.assert_close(logits, want)
    # Neither a sequence of patches nor embeddings of classes: only its weights distinguish classes.
    for image in classes:
        torch.testing.assert_close(image, torch.stack([row / row.norm() for row in classifier.head.weight]))
