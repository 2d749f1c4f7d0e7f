package main

import (
	"bytes"
	"crypto/cipher"
	"encoding/base64"
	"slices"
	"strings"
	"testing"
)

// The known answers are from WeChat's documents (消息推送, 消息加解密说明).
const (
	docToken = "AAAAA"
	docAppID = "wxba5fad812f8e6fb9"
	// printf '%s\n' AAAAA 1714036504 1514711492 | LC_ALL=C sort | tr -d '\n' | sha1sum
	docSignature = "f464b24fc39322e44b38aa78f5edd27bd1441696"
	docEncrypt   = "+qdx1OKCy+5JPCBFWw70tm0fJGb2Jmeia4FCB7kao+/Q5c/ohsOzQHi8khUOb05JCpj0JB4RvQMkUyus8TPxLKJGQqcvZqzD" +
		"pVzazhZv6JsXUnnR8XGT740XgXZUXQ7vJVnAG+tE8NUd4yFyjPy7GgiaviNrlCTj+l5kdfMuFUPpRSrfMZuMcp3Fn2Pede2I" +
		"uQrKEYwKSqFIZoNqJ4M8EajAsjLY2km32IIjdf8YL/P50F7mStwntrA2cPDrM1kb6mOcfBgRtWygb3VIYnSeOBrebufAlr7F" +
		"9mFUPAJGj04="
	docMessage = `{"ToUserName":"gh_97417a04a28d","FromUserName":"o9AgO5Kd5ggOC-bXrbNODIiE3bGY",` +
		`"CreateTime":1714112445,"MsgType":"event","Event":"debug_demo","debug_str":"hello world"}`
)

var docKey = strings.Repeat("A", 43)

func testKey(t testing.TB, s string) *aesKey {
	t.Helper()
	key, err := parseAESKey(s)
	must(t, err)
	return key
}

func TestSignature(t *testing.T) {
	for want, parts := range map[string][]string{
		docSignature: {docToken, "1714036504", "1514711492"},
		"899cf89e464efb63f54ddac96b0a0a235f53aa78": {docToken, "1714037059", "486452656"},
		"046e02f8204d34f8ba5fa3b1db94908f3df2e9b3": {docToken, "1714112445", "415670741", docEncrypt},
	} {
		given := slices.Clone(parts)
		equal(t, "signature", signature(parts...), want)
		for got, right := range map[string]bool{want: true, "": false, want[1:]: false, strings.ToUpper(want): false,
			want + "0": false} {
			equal(t, got+" verifies", verify(got, parts...), right)
		}
		if !slices.Equal(parts, given) {
			t.Errorf("the parts are now %.30q", parts)
		}
	}
}

func TestSafeModeKnownAnswers(t *testing.T) {
	key := testKey(t, docKey)
	opened, err := key.open(docEncrypt, docAppID)
	must(t, err)
	equal(t, "opened", string(opened), docMessage)
	sealed := key.seal([]byte("707722b803182950"), []byte(`{"demo_resp":"good luck"}`), docAppID)
	equal(t, "sealed", sealed,
		"ELGduP2YcVatjqIS+eZbp80MNLoAUWvzzyJxgGzxZO/5sAvd070Bs6qrLARC9nVHm48Y4hyRbtzve1L32tmxSQ==")
}

func TestWhatDoesNotOpenFailsAlike(t *testing.T) {
	key := testKey(t, docKey)
	random, five := strings.Repeat("r", 16), strings.Repeat("\x05", 5)
	encrypted := func(plain string) string {
		sealed := []byte(plain)
		cipher.NewCBCEncrypter(key.block, key.iv).CryptBlocks(sealed, sealed)
		return base64.StdEncoding.EncodeToString(sealed)
	}
	for name, sealed := range map[string]string{
		"empty":            "",
		"not base64":       "!",
		"not whole blocks": "AAAA",
		"a changed byte":   docEncrypt[:len(docEncrypt)-10] + "A" + docEncrypt[len(docEncrypt)-9:],
		"somebody else's":  key.seal(make([]byte, 16), []byte("hello"), "wx0000000000000000"),
		"no appid":         key.seal(make([]byte, 16), []byte("hello"), ""),
		"appid prolonged":  key.seal(make([]byte, 16), []byte("hello"), docAppID+"x"),
		"another key's":    testKey(t, strings.Repeat("B", 43)).seal(make([]byte, 16), []byte("hello"), docAppID),

		"padding of 0":                encrypted(random + "\x00\x00\x00\x05hello" + strings.Repeat("x", 22) + "\x00"),
		"padding of 37, which is %":   encrypted(random + "\x00\x00\x00\x05hello" + docAppID + strings.Repeat("%", 37)),
		"padding that is not uniform": encrypted(random + "\x00\x00\x00\x05hello" + docAppID + "\x01\x01\x01\x01\x05"),
		"shorter than its header":     encrypted(docAppID + strings.Repeat("\x0e", 14)),
		"a message that goes on":      encrypted(random + "\x00\x00\x00\x04hello" + docAppID + five),
		"a message beyond the end":    encrypted(random + "\x00\x00\x03\xe8hello" + docAppID + five),
		"a message of 4 GiB":          encrypted(random + "\xff\xff\xff\xffhello" + docAppID + five),
	} {
		if got, err := key.open(sealed, docAppID); err != errSealed {
			t.Errorf("%s: open = %q, %v, want errSealed", name, got, err)
		}
	}
}

func TestParseAESKey(t *testing.T) {
	const spare = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQ" // spare bits set in the last
	for key, want := range map[string]bool{docKey: true, spare: true, "": false, docKey[1:]: false,
		docKey + "A": false, docKey + "\n": false, docKey[1:] + "!": false, docKey[1:] + "=": false} {
		if _, err := parseAESKey(key); (err == nil) != want {
			t.Errorf("%q: %v", key, err)
		}
	}
}

// FuzzVerify: only the signature itself verifies.
func FuzzVerify(f *testing.F) {
	f.Add(docSignature, docToken, "1714036504", "1514711492")
	f.Add("", "", "", "")
	f.Fuzz(func(t *testing.T, got, token, timestamp, nonce string) {
		want := signature(token, timestamp, nonce)
		if verify(got, token, timestamp, nonce) != (got == want) || !verify(want, nonce, token, timestamp) {
			t.Errorf("%q for %q, %q, %q", got, token, timestamp, nonce)
		}
	})
}

// FuzzOpen: what we seal opens to the same, and what does not open is errSealed. That a
// message opens does not tell who sealed it: in CBC, whoever changes a bit of one block
// changes the same bit of the next block's message, without the key.
func FuzzOpen(f *testing.F) {
	f.Add("", []byte("message"))
	f.Add(docEncrypt, []byte(docMessage))
	f.Fuzz(func(t *testing.T, encrypt string, message []byte) {
		key := testKey(t, docKey)
		got, err := key.open(key.seal(make([]byte, 16), message, docAppID), docAppID)
		if err != nil || !bytes.Equal(got, message) {
			t.Errorf("a sealed %q opens to %q, %v", message, got, err)
		}
		if got, err := key.open(encrypt, docAppID); err != nil && (err != errSealed || got != nil) {
			t.Errorf("open = %q, %v, want errSealed alone", got, err)
		}
	})
}
