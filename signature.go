package main

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/sha1"
	"crypto/subtle"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"slices"
	"strings"
)

// errSealed is every way in which a sealed message can fail to open: which one
// it was is nobody's business outside.
var errSealed = errors.New("message does not open with this key and appid")

// signature returns what WeChat puts into signature, of Token, timestamp and
// nonce, and into msg_signature, of these and Encrypt: the SHA-1, in lower hex,
// of the parts sorted by bytes and joined.
func signature(parts ...string) string {
	sum := sha1.Sum([]byte(strings.Join(slices.Sorted(slices.Values(parts)), "")))
	return hex.EncodeToString(sum[:])
}

// verify tells, in constant time, whether got is the signature of parts.
func verify(got string, parts ...string) bool {
	return subtle.ConstantTimeCompare([]byte(got), []byte(signature(parts...))) == 1
}

// An aesKey seals and opens the messages of safe mode.
type aesKey struct {
	block cipher.Block
	iv    []byte // the first 16 bytes of the key
}

// parseAESKey decodes an EncodingAESKey: 43 characters of base64, whose last
// one may carry spare bits, for 32 bytes.
func parseAESKey(s string) (*aesKey, error) {
	key, err := base64.StdEncoding.DecodeString(s + "=")
	if err != nil || len(key) != 32 || len(s) != 43 {
		return nil, errors.New("not 43 characters of base64")
	}
	block, err := aes.NewCipher(key)
	return &aesKey{block, key[:aes.BlockSize]}, err
}

// padBlock is the block size of WeChat's PKCS#7, which is not that of AES.
const padBlock = 32

// seal encrypts a message of safe mode: AES-256-CBC over 16 random bytes, the
// message's length, the message and the appid. random is 16 bytes.
func (k *aesKey) seal(random, message []byte, appID string) string {
	plain := slices.Clone(random)
	plain = binary.BigEndian.AppendUint32(plain, uint32(len(message)))
	plain = append(append(plain, message...), appID...)
	pad := padBlock - len(plain)%padBlock
	plain = append(plain, bytes.Repeat([]byte{byte(pad)}, pad)...)
	cipher.NewCBCEncrypter(k.block, k.iv).CryptBlocks(plain, plain)
	return base64.StdEncoding.EncodeToString(plain)
}

// open returns the message of a sealed push, whose msg_signature the caller has
// verified. Every failure is errSealed.
func (k *aesKey) open(encrypt, appID string) ([]byte, error) {
	plain, err := base64.StdEncoding.DecodeString(encrypt)
	if err != nil || len(plain) == 0 || len(plain)%aes.BlockSize != 0 {
		return nil, errSealed
	}
	cipher.NewCBCDecrypter(k.block, k.iv).CryptBlocks(plain, plain)
	pad := plain[len(plain)-1]
	body, padded := bytes.CutSuffix(plain, bytes.Repeat([]byte{pad}, int(pad)))
	body, ours := bytes.CutSuffix(body, []byte(appID))
	const header = 16 + 4 // random, length
	if pad < 1 || pad > padBlock || !padded || !ours || len(body) < header ||
		int(binary.BigEndian.Uint32(body[16:])) != len(body)-header {
		return nil, errSealed
	}
	return body[header:], nil
}
