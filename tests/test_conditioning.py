"Cross-attention against diffusers on copied weights; masks, dropping and guidance against closed forms; text against the models it wraps."
import copy, json, math, time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace
import numpy as np, pytest, torch
from safetensors.torch import load_file
from torch import nn
from diffusers.models.attention_processor import Attention
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTokenizer
import latentdiff.conditioning
from latentdiff.conditioning import (ClassConditioner, Conditioned, ConditionalUNet, CrossAttention, FactorReader, StyleConditioner, TextConditioner,
                                     attention_maps, class_conditioner, conditional, guide, make_conditional, text_encoder, train_reader)
from latentdiff.core import UserError, load_component, preset, save_component
from latentdiff.data import from_uint8
from latentdiff.noisify import Process
from latentdiff.source import listed
from latentdiff.sampling import euler, optimal_denoiser, sample, start_noise, time_steps
from latentdiff.unet import SelfAttention, UNet, train_denoiser

FLOW = Process('flow', 'velocity', 'logit_normal')
SHAPE = dict(in_channels=2, widths=(16,32), depth=1, attn_levels=(0,1), head_dim=16)

def randomise(net, seed=0):
    "Give every weight of `net` a value, so that nothing hides behind a zero."
    g = torch.Generator().manual_seed(seed)
    for p in net.parameters(): p.data = torch.randn(p.shape, generator=g)*(.1 if p.ndim > 1 else .5)
    return net

def noise(*shape, seed=1): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
def lengths(*ns): return torch.arange(max(ns)) < torch.tensor(ns)[:, None]

@torch.no_grad()
def gap(a, b): return (a - b).abs().max().item()

def one_line(error): return error.match(r'\A[^\n]+\Z')

# --- cross-attention ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('c,heads,dim', [(32,1,20), (64,4,7), (48,3,48)])
@pytest.mark.parametrize('masked', [False, True])
def test_cross_attention_is_diffusers(c, heads, dim, masked):
    ours = randomise(CrossAttention(c, dim, heads))
    theirs = Attention(c, cross_attention_dim=dim, heads=heads, dim_head=c//heads, bias=True, norm_num_groups=ours.group_norm.num_groups,
                       eps=1e-5, residual_connection=True)
    theirs.load_state_dict(ours.state_dict())
    x,tokens,mask = noise(3, c, 4, 6), noise(3, 5, dim, seed=2), lengths(5, 3, 1) if masked else None
    bias = torch.zeros(3, 1, 5).masked_fill(~mask[:, None], -1e4) if masked else None
    assert gap(ours(x, tokens, mask), theirs(x, tokens, attention_mask=bias)) < 1e-5
    assert gap(ours(x, tokens, mask), x) > .1                           # and it does something
    if masked: assert gap(ours(x, tokens, mask), ours(x, tokens)) > .01

def test_weights_are_those_of_forward():
    "The shown softmax, applied to the values by hand, gives what `forward` gives; masked tokens have weight 0."
    m,x,tokens,mask = randomise(CrossAttention(32, 20, 2)), noise(3, 32, 4, 6), noise(3, 5, 20, seed=2), lengths(5, 3, 1)
    w = m.weights(x, tokens, mask)
    assert w.shape == (3, 2, 24, 5) and gap(w.sum(-1), torch.ones(3, 2, 24)) < 1e-5
    assert w.masked_select(~mask[:, None, None]).abs().max() == 0
    out = (w @ m.to_v(tokens).unflatten(2, (2, 16)).transpose(1, 2)).transpose(1, 2).flatten(2)
    assert gap(x + m.to_out[0](out).transpose(1, 2).reshape(x.shape), m(x, tokens, mask)) < 1e-5

def test_cross_attention_refuses_uneven_heads():
    with pytest.raises(ValueError, match='c is 32: give multiples of 3, such as 30 or 33'): CrossAttention(32, 8, 3)

# --- the net --------------------------------------------------------------------------------------------------------

def test_starts_as_the_unet_of_its_seed():
    "Same seed, same weights: what is new in ConditionalUNet starts silent and takes no random numbers from the rest."
    torch.manual_seed(5); unet = UNet(**SHAPE)
    torch.manual_seed(5); net = ConditionalUNet(**SHAPE, dim=12)
    again = conditional(unet, 12)
    shared = [k for k in net.state_dict() if not k.startswith(('null', 'norm.')) and '.cross.' not in k]
    assert len(shared) == len(unet.state_dict()) and all(gap(net.state_dict()[k], again.state_dict()[k]) == 0 for k in shared)

def test_takes_over_a_trained_unet():
    unet = randomise(UNet(**SHAPE))
    net,x,t = conditional(unet, 12), noise(3, 2, 8, 8), torch.tensor([100., 500., 900.])
    assert gap(net(x, t), unet(x, t)) < 1e-5 and gap(net(x, t, noise(3, 4, 12, seed=3)), unet(x, t)) < 1e-5
    assert unet(x, t).abs().max() > .1
    sizes = [sum(isinstance(m, cls) for m in net.modules()) for cls in (SelfAttention, CrossAttention)]
    assert sizes[0] == sizes[1] == sum(isinstance(m, SelfAttention) for m in unet.modules())

def test_listens_once_trained():
    net,x,t = randomise(ConditionalUNet(**SHAPE, dim=12)), noise(3, 2, 8, 8), torch.full((3,), 500.)
    assert gap(net(x, t, noise(3, 4, 12, seed=3)), net(x, t, noise(3, 4, 12, seed=4))) > .01

def test_padded_tokens_change_nothing():
    net,x,t,tokens = randomise(ConditionalUNet(**SHAPE, dim=12)), noise(3, 2, 8, 8), torch.full((3,), 500.), noise(3, 4, 12, seed=3)
    mask = lengths(4, 2, 1)
    padded = torch.cat([torch.where(mask[..., None], tokens, 1e3), noise(3, 6, 12)], 1)
    wide = torch.cat([mask, torch.zeros(3, 6, dtype=torch.bool)], 1)
    assert gap(net(x, t, tokens, mask), net(x, t, padded, wide)) < 1e-5
    assert gap(net(x, t, tokens, mask)[1:2], net(x[1:2], t[1:2], tokens[1:2, :2])) < 1e-5   # as if they were not there
    assert gap(net(x, t, tokens, mask), net(x, t, tokens)) > .01

def test_a_row_without_tokens_is_unconditional():
    net,x,t = randomise(ConditionalUNet(**SHAPE, dim=12)), noise(2, 2, 8, 8), torch.full((2,), 500.)
    out = net(x, t, noise(2, 4, 12, seed=3), lengths(4, 0))
    assert gap(out[1], net(x, t)[1]) < 1e-5 and gap(out[0], net(x, t)[0]) > .01

@pytest.mark.parametrize('shape', [(2,12), (2,4,11), (3,4,12)])
def test_tokens_of_the_wrong_shape(shape):
    net = ConditionalUNet(**SHAPE, dim=12)
    with pytest.raises(UserError, match='tokens \\(2, n, 12\\)') as e: net(noise(2, 2, 8, 8), 1000*torch.rand(2), torch.zeros(shape))
    one_line(e)

def test_saved_and_loaded(tmp_path):
    net,x,t,tokens = randomise(ConditionalUNet(**SHAPE, dim=12)), noise(2, 2, 8, 8), 1000*torch.rand(2), noise(2, 4, 12)
    save_component(net, tmp_path/'net')
    assert gap(load_component(tmp_path/'net')(x, t, tokens), net(x, t, tokens)) == 0
    assert json.loads((tmp_path/'net/config.json').read_text())['dim'] == 12
    assert not (tmp_path/'net'/'diffusion_pytorch_model.safetensors').exists() # a name that diffusers would take for its own

@pytest.mark.parametrize('bad', [float('nan'), float('inf')])
def test_padding_may_hold_anything(bad):
    "NaN in tokens that do not count: outputs and gradients are those of tokens that hold zeros there."
    mask,tokens = lengths(4, 2, 1), noise(3, 4, 12, seed=3)
    def both(hole):
        for net,args in ((randomise(CrossAttention(16, 12, 2)), (noise(3, 16, 4, 4),)), (randomise(ConditionalUNet(**SHAPE, dim=12)), (noise(3, 2, 8, 8), torch.full((3,), 500.)))):
            tok = torch.where(mask[..., None], tokens, hole).requires_grad_()
            out = net(*args, tok, mask)
            out.square().sum().backward()
            yield torch.cat([o.flatten() for o in (out, tok.grad, *(p.grad for p in net.parameters()))])
    for a,b in zip(both(0.), both(bad)): assert a.isfinite().all() and gap(a, b) < 1e-4*a.abs().max().item()

def test_attention_maps():
    "One map for each cross-attention, at its resolution, over the null token and the others; they sum to 1."
    net,x,t = randomise(ConditionalUNet(**SHAPE, dim=12)), noise(2, 2, 8, 8), 1000*torch.rand(2)
    maps = attention_maps(net, x, t, noise(2, 4, 12), lengths(4, 2))
    assert [tuple(m.shape) for m in maps] == [(2,5,s,s) for s in (8,4,4,4,4,8,8)]
    assert all(gap(m.sum(1), torch.ones(2, *m.shape[2:])) < 1e-5 and m[1, 3:].abs().max() == 0 for m in maps)
    assert not any(m._forward_pre_hooks for m in net.modules())

# --- conditioners ---------------------------------------------------------------------------------------------------

def test_class_tokens():
    c = ClassConditioner(['cat', 'dog', 'cow'], 8)
    tokens,mask = c(torch.tensor([2, 0]))
    assert tokens.shape == (2, 1, 8) and mask.all() and torch.equal(tokens[:, 0], c.embedding.weight[[2, 0]])
    assert torch.equal(c(['cow', 'cat'])[0], tokens) and torch.equal(c([2, 0])[0], tokens)

@pytest.mark.parametrize('bad', [['bird'], [3], [-1], torch.tensor([0, 3]), [None]])
def test_unknown_class(bad):
    with pytest.raises(UserError, match='give 0 to 2 or one of cat, dog, cow') as e: ClassConditioner(['cat', 'dog', 'cow'], 8)(bad)
    one_line(e)

def test_many_classes_are_not_all_named():
    with pytest.raises(UserError, match='give 0 to 998 or one of') as e: ClassConditioner([f'a kind of beetle, {i}' for i in range(999)], 8)(['a bird'])
    assert len(str(e.value)) < 800

@pytest.mark.parametrize('name,typed', [('cafe\u0301', 'caf\u00e9'), (' cat', 'cat'), ('cat', 'cat ')])
def test_a_class_may_be_typed_as_it_is_read(name, typed):
    "macOS takes letters apart, and spaces at an end are not seen; what two classes are called by then has to be exact"
    c = ClassConditioner(['dog', name], 8)
    assert c.number(typed) == c.number(name) == 1
    with pytest.raises(UserError): ClassConditioner([' dog', 'dog '], 8).number('dog')

def test_where_names_are_numbers_a_number_is_a_name():
    "Grades 1 to 5, months: what is asked for is that class, or nothing; a tensor holds places, as labels do"
    c = ClassConditioner(['1', '10', '2'], 8)
    assert [c.number(o) for o in ('1', np.int64(1), '10', 10, '2', 2)] == [0, 0, 1, 1, 2, 2] and ClassConditioner(['01', '02'], 8).number(1) == 0
    for bad in ('0', 0, '3', -1, True):
        with pytest.raises(UserError, match='give one of 1, 10, 2'): c.number(bad)
    assert torch.equal(c(torch.tensor([0, 2]))[0], c(['1', 2])[0])
    assert [ClassConditioner(['1', 'cat'], 8).number(o) for o in ('1', 1, '0')] == [0, 1, 0]   # not all are numbers
    with pytest.raises(UserError, match='no two alike'): ClassConditioner(['cat', 'cat'], 8)

def test_names_with_commas():
    "A list of classes can be read, and what it shows can be given"
    c = ClassConditioner(['a, b', 'c'], 8)
    with pytest.raises(UserError, match='one of "a, b", c'): c.number('a')
    assert [c.number(o) for o in listed('"a, b",c')] == [0, 1] and listed('a, b') == ['a', 'b']

def test_style_forgets_where():
    "The same thing on the same ground, moved: the same tokens. Another colour: other tokens."
    style,(a,b,c) = randomise(StyleConditioner(3, 16)), torch.full((3, 3, 64, 64), .2)
    patch = noise(3, 8, 8)
    a[:, 20:28, 20:28], b[:, 32:40, 28:36], c[:, 20:28, 20:28] = patch, patch, -patch
    tokens = style(torch.stack([a, b, c]))[0]
    assert tokens.shape == (3, 3, 16) and gap(tokens[0], tokens[1]) < 1e-4 and gap(tokens[0], tokens[2]) > 1e-3

def test_style_takes_both_kinds_of_image():
    style,pixels = StyleConditioner(1, 16), torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert gap(style(pixels)[0], style(from_uint8(pixels))[0]) == 0
    with pytest.raises(UserError, match=r'style images are .*: give floats or uint8.* with c in \(1,\)') as e: style(torch.zeros(2, 3, 16, 16))
    one_line(e)

# --- text -----------------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def clip_folder(tmp_path_factory):
    "A CLIP with random weights, both halves, saved as the Hub's are."
    folder = tmp_path_factory.mktemp('clip')
    words = ['red', 'bed', 'rug', 'a']
    pieces = [c for w in words for c in w] + [w[:k] for w in words for k in range(2, len(w))]
    vocab = list(dict.fromkeys([*pieces, *(f'{c}</w>' for w in words for c in w), *(f'{w}</w>' for w in words), '<|startoftext|>', '<|endoftext|>']))
    merges = ['r e', 're d</w>', 'b e', 'be d</w>', 'r u', 'ru g</w>']
    (folder/'vocab.json').write_text(json.dumps({o: i for i,o in enumerate(vocab)}))
    (folder/'merges.txt').write_text('\n'.join(['#version: 0.2', *merges]))
    tokenizer = CLIPTokenizer.from_pretrained(folder) if not hasattr(CLIPTokenizer, 'vocab_files_names') else CLIPTokenizer(str(folder/'vocab.json'), str(folder/'merges.txt'))
    torch.manual_seed(0)
    small = dict(hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    ends = dict(bos_token_id=vocab.index('<|startoftext|>'), eos_token_id=vocab.index('<|endoftext|>'))
    config = CLIPConfig(text_config=dict(**small, **ends, vocab_size=len(vocab), max_position_embeddings=16), vision_config=dict(**small, image_size=8, patch_size=4), projection_dim=8)
    CLIPModel(config).eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder

def test_clip_text_from_a_folder(clip_folder):
    "The text half of a CLIP, as saved: its own answer to each caption alone, whatever stands beside it in the batch."
    text,clip = TextConditioner(str(clip_folder), max_tokens=16), CLIPModel.from_pretrained(clip_folder).eval()
    tokens,mask = text(['a red bed', 'a rug'])
    assert text.dim == 24 and [len(text.words(o)) for o in ('a red bed', 'a rug')] == mask.sum(1).tolist() == [5, 4]
    for caption,tok,m in zip(['a red bed', 'a rug'], tokens, mask):
        alone = clip.text_model(**text_encoder(str(clip_folder))[0]([caption], return_tensors='pt')).last_hidden_state[0]
        assert gap(tok[m], alone) < 5e-3 and alone.abs().max() > .5    # the table is float16
    assert isinstance(text_encoder(str(clip_folder))[1], CLIPTextModel)

def test_minilm_is_the_sentence_transformer():
    "The mean of its tokens, normalised, is the embedding that sentence-transformers computes with the same weights."
    from sentence_transformers import SentenceTransformer
    captions = ['a bedroom with a red bed', 'night', 'a bedroom with a blue bed on the left, a window by day and an unlit lamp']
    text = TextConditioner()
    tokens,mask = text(captions)
    mean = (tokens*mask[..., None]).sum(1)/mask.sum(1, keepdim=True)
    theirs = SentenceTransformer(str(latentdiff.conditioning.minilm_folder()), device='cpu').encode(captions, convert_to_tensor=True)
    assert gap(mean/mean.norm(dim=1, keepdim=True), theirs) < 1e-3 and tokens.shape[2] == text.dim == 384

def test_each_caption_is_encoded_once(monkeypatch):
    "When it is first looked at: a finished run that numbers its captions has no use for a language model"
    text,seen,encode = TextConditioner(), [], TextConditioner.encode
    monkeypatch.setattr(TextConditioner, 'encode', lambda self, captions: (seen.extend(captions), encode(self, captions))[1])
    rows = text.rows(['a bed', 'a rug', 'a bed']*5)
    assert seen == [] and rows.tolist() == [0, 1, 0]*5
    before = text(rows[:2])
    assert seen == ['a bed', 'a rug']
    more = text.rows(['a rug', 'a bedroom with a red bed on the left and a picture'])
    after = text(rows[:2])
    assert seen[2:] == ['a bedroom with a red bed on the left and a picture'] and more.tolist() == [1, 2]
    n = before[0].shape[1]
    assert after[0].shape[1] > n and gap(after[0][:, :n], before[0]) == 0 and not after[1][:, n:].any() and torch.equal(after[1][:, :n], before[1])
    assert text.table.dtype == torch.float16 and len(text.table) == 3

def test_a_longer_caption_changes_no_bit_of_what_is_drawn_after_it():
    text, x = TextConditioner(), noise(2, 2, 8, 8)
    model = Conditioned(randomise(ConditionalUNet(**SHAPE, dim=text.dim)), text)
    draw = lambda: guide(model, ['a red bed', ''], 2., negative='a lamp')(x, torch.full((2,), 500.))
    before = draw()
    text(['a bedroom with a blue bed on the left, a window by day, an unlit lamp on a table, a rug and a picture on a wall'])
    assert torch.equal(draw(), before)

def test_what_is_drawn_of_a_caption_does_not_depend_on_the_others():
    "Neither on those it was encoded with, nor on those beside it in a batch"
    captions, x = ['a red bed', 'a bedroom with a blue bed on the left, a window by day, an unlit lamp on a table and a rug'], noise(2, 2, 8, 8)
    both, alone = TextConditioner(), TextConditioner()
    assert torch.equal(both(captions)[0][:1], alone(captions[:1])[0])
    net = randomise(ConditionalUNet(**SHAPE, dim=both.dim))
    drawn = [Conditioned(net, o)(x, torch.full((2,), 500.), [captions[0], other]) for o, other in ((both, captions[1]), (alone, ''))]
    assert torch.equal(drawn[0][0], drawn[1][0])

def test_a_table_of_captions_stays_as_it_is_when_a_network_is_cast():
    text = TextConditioner()
    before = text(['a red bed'])[0]
    assert text.to(torch.bfloat16).table.dtype == torch.float16 and torch.equal(text(['a red bed'])[0], before)
    assert text.double().float().to('meta').table.device.type == 'meta' and text.to_empty(device='cpu').table.device.type == 'cpu'

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision_draws_what_a_caption_says(dtype):
    "On the CPU too, where a pipeline draws under autocast"
    text = TextConditioner()
    model = Conditioned(randomise(ConditionalUNet(**SHAPE, dim=text.dim)), text)
    x, t = noise(2, 2, 8, 8), torch.full((2,), 500.)
    whole = model(x, t, ['a red bed', ''])
    model = copy.deepcopy(model).to(dtype)
    with torch.autocast('cpu', dtype): assert gap(model(x, t, ['a red bed', 'a lamp at night'])[:1].float(), whole[:1]) < .05*whole.abs().max()

def test_a_caption_is_cut_where_the_language_model_ends():
    "MiniLM has 512 places"
    text = TextConditioner(max_tokens=600)
    assert len(text.words('a bed '*700)) == 512 and text(['a bed '*700])[1].sum() == 512
    with pytest.raises(UserError, match='max_tokens is 1000000'): TextConditioner(max_tokens=10**6)

@pytest.mark.parametrize('rows', [torch.tensor([99]), torch.tensor([.5, .5]), torch.tensor([[0]]), torch.tensor([-1])])
def test_rows_that_are_none(rows):
    text = TextConditioner()
    text(['a bed'])
    with pytest.raises(UserError, match='rows is') as e: text(rows)
    one_line(e)

def test_many_new_captions_in_batches(monkeypatch):
    "More captions than one batch of the encoder: each gets its own row."
    monkeypatch.setattr(TextConditioner, 'encode', lambda self, cs: (torch.tensor([[[float(c)]*2]*(int(c) % 3 + 1) + [[0.]*2]*(2 - int(c) % 3) for c in cs]), torch.ones(len(cs), 3, dtype=torch.bool)))
    text = TextConditioner()
    assert torch.equal(text([str(i) for i in range(600)])[0][:, 0, 0], torch.arange(600.))

def test_new_captions_from_several_threads(monkeypatch):
    "As in a small web page: four requests at one time, each gets the tokens of its own caption, then and later"
    def encode(self, captions):
        time.sleep(.002)   # while another thread comes in
        return torch.tensor([[[float(c)]*2] for c in captions]), torch.ones(len(captions), 1, dtype=torch.bool)
    monkeypatch.setattr(TextConditioner, 'encode', encode)
    text, value = TextConditioner(), lambda c: text([str(c)])[0][0, 0, 0].item()
    with ThreadPoolExecutor(4) as pool: assert [*pool.map(value, range(100))] == [*range(100)]
    assert [value(c) for c in range(100)] == [*range(100)]

def test_an_empty_caption_says_nothing():
    assert TextConditioner()(['', 'a bed', ' '])[1].any(1).tolist() == [False, True, False]

@pytest.mark.parametrize('bad', [[None], ['a bed', 3], [], [['a bed']]])
def test_what_is_no_caption(bad):
    with pytest.raises(UserError, match='captions are a list of strings') as e: TextConditioner().rows(bad)
    one_line(e)

def test_a_caption_too_long_is_cut():
    assert TextConditioner(max_tokens=8)(['bed '*50])[0].shape[1] == 8

@pytest.mark.parametrize('model', ['no-such/model', 'nowhere'])
def test_text_encoder_that_is_not_there(model):
    with pytest.raises(UserError, match=f"cannot load the text encoder {model}.*use 'minilm'") as e: TextConditioner(model)(['a'])
    one_line(e)

def test_a_language_model_that_is_no_bert_is_one_line(clip_folder, tmp_path):
    "T5 answers to other words; a tokenizer may have more words than its model; weights may be damaged"
    import safetensors.torch, shutil
    from transformers import T5Config, T5Model
    T5Model(T5Config(vocab_size=64, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)).save_pretrained(tmp_path/'t5')
    for o in ('t5', 'sick', 'words'): shutil.copytree(clip_folder, tmp_path/o, ignore=shutil.ignore_patterns(*['*.safetensors', 'config.json'][:2*(o == 't5')]), dirs_exist_ok=True)
    f = tmp_path/'sick'/'model.safetensors'
    state = safetensors.torch.load_file(f)
    k = next(k for k in state if k.startswith('text_model') and k.endswith('mlp.fc1.bias'))
    safetensors.torch.save_file(state | {k: state[k]*float('nan')}, f, metadata={'format': 'pt'})
    def said(folder):
        with pytest.raises(UserError) as e: TextConditioner(str(tmp_path/folder))(['a bed'])
        return one_line(e) and str(e.value)
    assert 'cannot load the text encoder' in said('t5')
    assert 'mlp.fc1.bias that is not finite' in said('sick')
    config = json.loads((tmp_path/'words'/'config.json').read_text())
    config['text_config']['vocab_size'] = 8
    (tmp_path/'words'/'config.json').write_text(json.dumps(config))
    o = 'text_model.embeddings.token_embedding.weight'
    state[o] = state[o][:8].clone()
    safetensors.torch.save_file(state, tmp_path/'words'/'model.safetensors', metadata={'format': 'pt'})
    assert 'cannot load the text encoder' in said('words')

def test_without_the_text_extra(monkeypatch):
    monkeypatch.setattr(latentdiff.conditioning, 'find_spec', lambda name: None)
    text_encoder.cache_clear()
    with pytest.raises(UserError, match=r'latentdiff\[text\]') as e: TextConditioner()(['a'])
    one_line(e)

# --- dropping -------------------------------------------------------------------------------------------------------

class Echo(nn.Module):
    "A net that answers with the mask it was given; its one weight keeps optimisers content."
    def __init__(self): super().__init__(); self.seen,self.w = [], nn.Parameter(torch.zeros(()))
    def forward(self, x, t, tokens=None, mask=None): self.seen.append(mask); return x + self.w

def within(share, p, n): return abs(share - p) < 4*(p*(1 - p)/n)**.5

def kept(n, conditions=1, seed=0, **kw):
    "(n, conditions) bool: what a training step is shown of n examples"
    model = Conditioned(Echo(), *[ClassConditioner('ab', 4) for _ in range(conditions)], **kw)
    torch.manual_seed(seed)
    model(torch.zeros(n, 1), torch.zeros(n), *[torch.zeros(n, dtype=torch.long)]*conditions)
    return model.net.seen[0]

def test_dropping_has_its_rate_and_follows_torchs_seed():
    "Training seeds torch at every step, so a run that goes on drops what it would have dropped."
    n = 20_000
    assert within(1 - kept(n, drop=.1).float().mean(), .1, n) and within(1 - kept(n, drop=.4).float().mean(), .4, n)
    assert torch.equal(kept(n), kept(n)) and not torch.equal(kept(n), kept(n, seed=1)) and kept(n, drop=0.).all()

@pytest.mark.parametrize('conditions,drop', [(1, .1), (2, .1), (2, .2), (3, .1), (3, .4), (2, .9)])
def test_each_condition_is_dropped_as_often_as_said(conditions, drop):
    "Each with `drop`, however many there are; all at once with half of it, and now and then all of them one by one."
    n = 40_000
    seen = kept(n, conditions, drop=drop)
    assert all(within(1 - o.float().mean(), drop, n) for o in seen.unbind(1))
    alone = (drop/2)/(1 - drop/2)
    assert within((~seen).all(1).float().mean(), drop/2 + (1 - drop/2)*alone**conditions, n)
    assert within(seen.all(1).float().mean(), (1 - drop/2)*(1 - alone)**conditions, n)

def test_nothing_is_dropped_outside_training():
    model = Conditioned(Echo(), ClassConditioner('ab', 4), drop=1.).eval()
    model(torch.zeros(9, 1), torch.zeros(9), torch.zeros(9, dtype=torch.long))
    assert model.net.seen[0].all()
    model.train(); model(torch.zeros(9, 1), torch.zeros(9), torch.zeros(9, dtype=torch.long))
    assert not model.net.seen[1].any()

def test_conditions_left_out():
    model = Conditioned(randomise(ConditionalUNet(**SHAPE, dim=12)), ClassConditioner('ab', 12), ClassConditioner('cd', 12)).eval()
    x,t = noise(2, 2, 8, 8), 1000*torch.rand(2)
    assert gap(model(x, t, None, ['c', 'd']), model.net(x, t, *model.conditioners[1](['c', 'd']))) < 1e-5
    assert gap(model(x, t), model.net(x, t)) == 0
    for conds in [(['a', 'b'],), (None, None)]:
        with pytest.raises(UserError) as e: model(x, t, *conds)
        one_line(e)

# --- training -------------------------------------------------------------------------------------------------------

def test_gradient_reaches_all_parameters():
    model = Conditioned(randomise(ConditionalUNet(**SHAPE, dim=16)), ClassConditioner('abc', 16), StyleConditioner(1, 16), drop=0.)
    model(noise(4, 2, 8, 8), 1000*torch.rand(4), torch.tensor([0, 1, 2, 0]), noise(4, 1, 32, 32)).square().sum().backward()
    assert [n for n,p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []

def test_training_learns_the_condition():
    "Latents that are +1 or -1 all over, by label: the samples have the sign that was asked for, without a label both."
    torch.manual_seed(0)
    labels = torch.arange(128) % 2
    z = (labels*2. - 1).view(-1, 1, 1, 1) + .1*noise(128, 1, 4, 4)
    model = Conditioned(ConditionalUNet(1, widths=(16,), depth=1, attn_levels=(0,), dim=8), ClassConditioner(['minus', 'plus'], 8))
    train_denoiser(model, FLOW, (z, labels), (z, labels), epochs=60, bs=64, lr=1e-2, device='cpu')
    signs = lambda cond, scale: sample(guide(model, cond, scale), FLOW, 40, (1, 4, 4), steps=8, bs=40, device='cpu').mean((1, 2, 3)).sign()
    asked = ['minus', 'plus']*20
    assert (signs(asked, 1.5) == torch.tensor([-1., 1.]*20)).float().mean() > .95
    assert .2 < (signs(asked, 0.) == torch.tensor([-1., 1.]*20)).float().mean() < .8

def test_training_without_conditions_is_as_before():
    "A tuple of latents alone trains to the same bits as the latents."
    z,nets = noise(64, 2, 8, 8), []
    for data in (z, (z,)):
        torch.manual_seed(0); nets.append(UNet(**SHAPE))
        train_denoiser(nets[-1], FLOW, data, data, epochs=1, bs=16, device='cpu')
    assert all(torch.equal(a, b) for a,b in zip(*(n.parameters() for n in nets)))

# --- guidance -------------------------------------------------------------------------------------------------------

MEANS = torch.tensor([[-2., 0.], [2., 1.]])
both_net,one_nets = optimal_denoiser(FLOW, MEANS, .5), [optimal_denoiser(FLOW, m[None], .5) for m in MEANS]

def toy(x, t, tokens, mask):
    "The optimal conditional denoiser of two Gaussians: a token says which; without a token, the mixture."
    toy.calls.append(len(x))
    k = tokens[:, 0, 0].long()
    out = torch.where(k[:, None] == 0, one_nets[0](x, t), one_nets[1](x, t))
    return torch.where(mask.any(1)[:, None], out, both_net(x, t))
toy.calls = []

WHICH = torch.tensor([0., 1., 1., 0.]).view(4, 1, 1)

@pytest.mark.parametrize('scale', [0., 1., 2.5, -1.])
def test_guidance_is_a_line(scale):
    "Through the unconditional answer at 0 and the conditional at 1, in one call of twice the batch, and at 1 of the batch."
    x,t = noise(4, 2), 1000*torch.tensor([.1, .4, .7, .99])
    cond,without = toy(x, t, WHICH, torch.ones(4, 1, dtype=torch.bool)), both_net(x, t)
    toy.calls.clear()
    assert gap(guide(toy, WHICH, scale)(x, t), without + scale*(cond - without)) < 1e-5 and toy.calls == [4 if scale == 1 else 8]
    assert gap(cond, without) > .1

def test_a_caption_that_cannot_be_encoded_is_forgotten(monkeypatch):
    tell, encode = TextConditioner(), TextConditioner.encode
    def choosy(self, captions):
        if 'bad' in captions: raise ValueError('bad')
        return encode(self, captions)
    monkeypatch.setattr(TextConditioner, 'encode', choosy)
    first = tell(['a red bed'])[0]
    with pytest.raises(ValueError): tell(['bad'])
    assert torch.equal(tell(['a red bed'])[0], first) and tell(['a lamp'])[0].isfinite().all() and len(tell.places) == 2

def test_guidance_of_its_own_for_each_image():
    "(b,) as well as (b,1), also where b is the width"
    x, t, by = noise(2, 2), torch.tensor([100., 400.]), torch.tensor([1., 3.])
    each = torch.cat([guide(toy, WHICH[i:i+1], by[i].item())(x[i:i+1], t[i:i+1]) for i in range(2)])
    for scale in (by, by[:, None]): assert gap(guide(toy, WHICH[:2], scale)(x, t), each) < 1e-5
    net = lambda x, time, tokens, mask: x*tokens.mean((1, 2))[:, None, None, None]
    z, p = torch.ones(2, 1, 2, 2), torch.ones(2, 1, 1)
    for scale in (by, by[:, None], by[:, None, None, None]):   # two rows of pixels: not one scale for each of those
        assert torch.equal(guide(net, p, scale, negative=0*p)(z, t), z*by[:, None, None, None])
    assert guide(net, p, by.double(), negative=0*p)(z, t).dtype == torch.float32
    for bad in (torch.ones(3), torch.ones(1, 2)):
        with pytest.raises(UserError, match='scale is'): guide(net, p, bad)

@pytest.mark.parametrize('scale', [0., 1., 3.])
def test_negative_takes_the_place_of_unconditional(scale):
    x,t = noise(4, 2), 1000*torch.tensor([.1, .4, .7, .9])
    ones = torch.ones(4, 1, dtype=torch.bool)
    pos,neg = toy(x, t, WHICH, ones), toy(x, t, 1 - WHICH, ones)
    assert gap(guide(toy, WHICH, scale, negative=1 - WHICH)(x, t), neg + scale*(pos - neg)) < 1e-5
    zero = torch.zeros(1, 1, 1)                                          # one negative for all
    neg = toy(x, t, zero.expand(4, 1, 1), ones)
    assert gap(guide(toy, WHICH, scale, negative=zero)(x, t), neg + scale*(pos - neg)) < 1e-5

def test_guided_samples_of_two_gaussians():
    "At scale 1 the samples are the chosen Gaussian; at 0 they are both; above 1 they move away from the other one."
    n = 2000
    which,x = torch.ones(n, 1, 1), start_noise(FLOW, (n, 2))
    draw = lambda scale: euler(guide(toy, which, scale), FLOW, x, time_steps(FLOW, 100))
    one = draw(1.)
    assert gap(one.mean(0), MEANS[1]) < .06 and gap(one.std(0), torch.full((2,), .5)) < .05
    assert within((draw(0.)[:, 0] > 0).float().mean(), .5, n)
    assert draw(4.)[:, 0].mean() > one[:, 0].mean() + .1

def test_negative_with_more_tokens_than_the_condition():
    "Lists of different lengths are padded: each side is as if it were alone."
    net,x,t = randomise(ConditionalUNet(**SHAPE, dim=12)), noise(2, 2, 8, 8), 1000*torch.rand(2)
    pos,neg = noise(2, 3, 12, seed=3), noise(1, 7, 12, seed=4)
    a,b = net(x, t, pos), net(x, t, neg.expand(2, -1, -1))
    for p,n,want in ((pos, neg, b + 2.*(a - b)), (neg.expand(2, -1, -1), pos, a + 2.*(b - a))):
        assert gap(guide(net, p, 2., negative=n)(x, t), want) < 1e-5

def test_scale_one_is_the_conditional_answer_to_the_bit():
    "Whatever is moved away from, even if it has more tokens: they are not even shown to the network; but it has to be sound"
    net,x,t = randomise(ConditionalUNet(**SHAPE, dim=12)), noise(2, 2, 8, 8), 1000*torch.rand(2)
    pos,neg,shown = noise(2, 3, 12, seed=3), noise(1, 7, 12, seed=4), []
    want = net(x, t, pos)
    net.register_forward_pre_hook(lambda m, args: shown.append((len(args[0]), args[2].shape[1])))
    for negative in (None, neg): assert torch.equal(guide(net, pos, 1., negative)(x, t), want) and torch.equal(guide(net, pos, 1, negative)(x, t), want)
    guide(net, pos, 1.01, neg)(x, t)
    assert shown == [(2, 3)]*4 + [(4, 7)]
    with pytest.raises(UserError, match='give one'): guide(net, noise(3, 3, 12), 1., negative=noise(2, 3, 12))
    with pytest.raises(UserError, match='not a finite number'): guide(net, pos, torch.tensor([1., math.nan])[:, None, None, None])
    for bad in (float('nan'), float('inf'), 'a', None, True):
        with pytest.raises(UserError, match='scale') as e: guide(net, pos, bad)
        one_line(e)

def test_guide_wants_one_condition_an_image():
    for call in (lambda: guide(toy, WHICH)(noise(3, 2), 1000*torch.rand(3)), lambda: guide(toy, WHICH, negative=WHICH[:2])):
        with pytest.raises(UserError, match='give one') as e: call()
        one_line(e)

def test_a_negative_caption_of_nothing_is_no_negative():
    text = TextConditioner()
    model = Conditioned(randomise(ConditionalUNet(**SHAPE, dim=text.dim)), text)
    x,t = noise(2, 2, 8, 8), 1000*torch.rand(2)
    a,b,c = (guide(model, ['a red bed', 'a rug'], 3., negative=o)(x, t) for o in (None, '', 'a lamp'))
    assert gap(a, b) < 1e-4 and gap(a, c) > .01

# --- the judge ------------------------------------------------------------------------------------------------------

def test_the_judge_reads_what_is_there():
    "Two factors, grey level and which half is bright: learned from pixels alone, read from both kinds of image, the same from the same seed."
    g = torch.Generator().manual_seed(0)
    codes = torch.stack([torch.randint(3, (400,), generator=g), torch.randint(2, (400,), generator=g)], 1)
    pixels = (40 + 60*codes[:, 0].view(-1, 1, 1, 1) + torch.randint(10, (400, 1, 16, 16), generator=g)).to(torch.uint8)
    for half in (0, 1): pixels[codes[:, 1] == half, :, :, 8*half:8*half + 8] += 60
    judges = [train_reader(pixels[:300], codes[:300], epochs=20, seed=s) for s in (0, 0, 1)]
    assert judges[0].sizes == [3, 2] and (judges[0].read(pixels[300:]) == codes[300:]).float().mean() > .95
    assert torch.equal(judges[0].read(pixels), judges[0].read(from_uint8(pixels)))
    weights = [j.head.weight for j in judges]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])

def test_the_judge_splits_its_answer_by_factor():
    scores = FactorReader([3, 2, 5])(torch.zeros(4, 3, 32, 32))
    assert [tuple(s.shape) for s in scores] == [(4, 3), (4, 2), (4, 5)]

# --- all together ---------------------------------------------------------------------------------------------------

def test_all_three_saved_and_loaded(tmp_path):
    "Class, style and text in one model: what is loaded samples the same images; the language model itself is not copied."
    parts = ClassConditioner(['a', 'b'], 384), StyleConditioner(1, 384), TextConditioner()
    model = Conditioned(randomise(ConditionalUNet(**SHAPE, dim=384)), *map(randomise, parts))
    cond = ['a', 'b'], noise(2, 1, 32, 32), ['a red bed', 'a rug']
    again = load_component(save_component(model, tmp_path/'denoiser'))
    draw = lambda m: sample(guide(m, cond, 2.), FLOW, 2, (2, 8, 8), steps=3, bs=2, device='cpu')
    assert gap(draw(model), draw(again)) < 1e-5 and again.drop == model.drop
    assert not [k for k in load_file(tmp_path/'denoiser'/'weights.safetensors') if k.startswith('conditioners.2')]

def test_saving_forgets_an_earlier_model_with_more_conditioners(tmp_path):
    "What is loaded is what was saved last, in its order, also past ten."
    net, names = ConditionalUNet(dim=8, **SHAPE), lambda: [list(c.config.classes) for c in load_component(tmp_path/'denoiser').conditioners]
    many = [ClassConditioner([f'class {i}'], 8) for i in range(11)]
    save_component(Conditioned(net, *many), tmp_path/'denoiser')
    assert names() == [[f'class {i}'] for i in range(11)]
    save_component(Conditioned(net, many[3]), tmp_path/'denoiser')
    assert names() == [['class 3']]

def test_a_saved_part_that_is_not_one_of_ours(tmp_path):
    folder = save_component(Conditioned(ConditionalUNet(dim=8, **SHAPE), ClassConditioner(['a'], 8)), tmp_path/'denoiser')
    config = json.loads((folder/'config.json').read_text())
    config['conditioners'][0]['_class_name'] = 'Popen'
    (folder/'config.json').write_text(json.dumps(config))
    with pytest.raises(UserError, match='no class named Popen') as e: load_component(folder)
    one_line(e)

def test_a_conditioner_without_a_config_is_not_saved(tmp_path):
    model = Conditioned(ConditionalUNet(dim=8, **SHAPE), nn.Identity())
    with pytest.raises(UserError, match='Identity has no config') as e: save_component(model, tmp_path/'denoiser')
    one_line(e)

def test_other_captions_are_another_run():
    "Captions are told by their rows in a table; two tables with the same rows are not the same."
    def said(captions):
        conditioner, seen = SimpleNamespace(places={o: i for i, o in enumerate(captions)}, to_json_string=lambda: '{}'), {}
        with pytest.MonkeyPatch.context() as m:
            m.setattr(latentdiff.conditioning, 'make_denoiser', lambda *args, **kw: seen.update(kw))
            make_conditional(None, None, None, conditioner, torch.arange(2))
        return seen['conditions']
    assert said(['a red bed', 'a blue bed']) == said(['a red bed', 'a blue bed']) != said(['a cat', 'a dog'])

def test_images_of_no_class_say_nothing():
    c = ClassConditioner(['cat', 'dog'], 8)
    tokens, mask = c(torch.tensor([1, -1]))
    assert mask.tolist() == [[True], [False]] and torch.equal(tokens[0, 0], c.embedding.weight[1])

# --- in a run -------------------------------------------------------------------------------------------------------

class Two:
    "Latents of two classes: of the one -1 everywhere, of the other 1; the last quarter is held out."
    fingerprint, classes, captions, labels = 'two', ['low', 'high'], None, torch.arange(256) % 2
    train_idxs, valid_idxs = torch.arange(192), torch.arange(192, 256)
    mean = ((labels*2. - 1).view(-1, 1, 1, 1) + .1*noise(256, 2, 4, 4)).numpy()
    def idxs(self, split): return self.train_idxs if split == 'train' else self.valid_idxs
    def tensor(self, split): return torch.from_numpy(self.mean)[self.idxs(split)]

@pytest.fixture(scope='module')
def told(tmp_path_factory):
    "A run folder whose denoiser listens, and how to make it."
    folder, p = tmp_path_factory.mktemp('run'), replace(preset('tiny'), widths=(16,32), steps=150, lr=4e-3, bs=32)
    make = lambda p=p, **kw: make_conditional(folder, Two(), p, *class_conditioner(Two()), device='cpu', **kw)
    return folder, make, p, make()

def test_a_run_listens(told):
    "Its denoiser, guided, draws what is asked for: class low is -1, class high 1."
    folder, make, p, (net, process) = told
    z = sample(guide(net, ['low', 'high']*16, 1.), process, 32, (2, 4, 4), steps=10, bs=32, device='cpu').mean((1, 2, 3))
    assert (z[::2] - -1).abs().max() < .5 and (z[1::2] - 1).abs().max() < .5

def test_a_run_that_listens_is_made_once(told, capsys):
    folder, make, p, (net, process) = told
    again, same = make()
    assert same == process and not capsys.readouterr().out
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), again.state_dict().values()))
    assert not (folder/'unet').exists() and (folder/'scheduler').exists()

def test_other_conditions_are_another_run(told):
    "The same latents with other labels are not the same denoiser."
    folder, make, p, _ = told
    with pytest.raises(UserError, match='made with conditions') as e:
        make_conditional(folder, Two(), p, ClassConditioner(['low', 'high']), 1 - Two.labels, device='cpu')
    one_line(e)

def test_no_classes_to_listen_to():
    with pytest.raises(UserError, match='folder of its own'): class_conditioner(SimpleNamespace(labels=None, captions=None))
