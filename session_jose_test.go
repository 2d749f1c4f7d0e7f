package main

import (
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"testing"
)

// joseScript verifies our token and makes others, by https://github.com/panva/jose.
// It prints the name of every check that its library does not pass as it should,
// and the tokens.
const joseScript = `
import { jwtVerify, SignJWT, UnsecuredJWT } from "jose";
const { token, secret, former, iss, aud } = JSON.parse(process.argv[1]);
const key = (text) => new TextEncoder().encode(text);
const right = { issuer: iss, audience: aud, algorithms: ["HS256"], requiredClaims: ["sub", "iat", "exp", "jti"] };
const refused = (secret, options) => jwtVerify(token, key(secret), { ...right, ...options })
  .then(() => "accepted", (err) => err.code);
const now = Math.floor(Date.now() / 1000);
const claims = { iss, aud, sub: "bob", iat: now, exp: now + 3600, jti: "1" };
const sign = (changes, secret, header) => new SignJWT({ ...claims, ...changes })
  .setProtectedHeader({ alg: "HS256", ...header }).sign(key(secret));
console.log(JSON.stringify({
  read: (await jwtVerify(token, key(secret), right)).payload,
  refused: {
    "another secret": await refused("x".repeat(32)),
    "another issuer": await refused(secret, { issuer: "https://evil.example" }),
    "another audience": await refused(secret, { audience: "wx0" }),
    "another day": await refused(secret, { currentDate: new Date((now + 25 * 3600) * 1000) }),
  },
  right: {
    "plain": await sign({}, secret), "with typ": await sign({}, secret, { typ: "JWT" }),
    "with the former secret": await sign({}, former),
    "with more claims": await sign({ scope: "x", name: "鲍勃" }, secret),
  },
  wrong: {
    "another secret": await sign({}, "x".repeat(32)), "another issuer": await sign({ iss: iss + "/" }, secret),
    "another audience": await sign({ aud: "wx0" }, secret), "a list": await sign({ aud: [aud] }, secret),
    "expired": await sign({ exp: now - 1 }, secret), "no expiry": await sign({ exp: undefined }, secret),
    "HS384": await sign({}, secret, { alg: "HS384" }), "none": new UnsecuredJWT(claims).encode(),
  },
}));
`

// TestJoseAndWeReadEachOthersTokens needs the folder WXSCAN_JOSE, in which
// npm install jose was run.
func TestJoseAndWeReadEachOthersTokens(t *testing.T) {
	node := program(t, "node", "nodejs")
	folder := os.Getenv("WXSCAN_JOSE")
	if folder == "" {
		if os.Getenv("WXSCAN_E2E") != "" {
			t.Fatal("WXSCAN_JOSE is not set, and WXSCAN_E2E is")
		}
		t.Skip("WXSCAN_JOSE is not set: the folder in which npm install jose was run")
	}
	w := newWorld(t, "WECHAT_SCOPE=snsapi_userinfo", "PUBLIC_URL=https://login.example.com")
	w.signer.secrets = []string{secretA, secretB}
	qr := w.begin(t, "getauthqr")
	w.scan(qr.Ticket, "alice", "")
	ours := w.check(t, qr.Ticket, "")
	given, err := json.Marshal(map[string]string{"token": ours.Token, "secret": secretA, "former": secretB,
		"iss": w.config.publicURL, "aud": w.config.appID})
	must(t, err)
	cmd := exec.CommandContext(t.Context(), node, "--input-type=module", "-e", joseScript, string(given))
	cmd.Dir, cmd.Stderr = folder, t.Output()
	printed, err := cmd.Output()
	must(t, err)
	var theirs struct {
		Read                  map[string]any
		Refused, Right, Wrong map[string]string
	}
	must(t, json.Unmarshal(printed, &theirs))
	for claim, want := range map[string]any{"iss": "https://login.example.com", "aud": demoAppID,
		"sub": "alice", "name": ours.Nickname, "picture": ours.Avatar} {
		if got := theirs.Read[claim]; got != want || want == "" {
			t.Errorf("jose reads the %s of our token as %q, want %q", claim, got, want)
		}
	}
	for name, want := range map[string]string{
		"another secret": "ERR_JWS_SIGNATURE_VERIFICATION_FAILED", "another day": "ERR_JWT_EXPIRED",
		"another issuer": "ERR_JWT_CLAIM_VALIDATION_FAILED", "another audience": "ERR_JWT_CLAIM_VALIDATION_FAILED",
	} {
		if got := theirs.Refused[name]; got != want {
			t.Errorf("jose checks our token for %s: %s, want %s", name, got, want)
		}
	}
	ask := func(token string) *httptest.ResponseRecorder {
		return w.do("GET", "/wechat/session", "", "Authorization", "Bearer "+token)
	}
	if len(theirs.Right) == 0 || len(theirs.Wrong) == 0 {
		t.Fatalf("jose made no tokens: %s", printed)
	}
	for name, token := range theirs.Right {
		if out := ask(token); out.Code != http.StatusOK || out.Header().Get("X-WeChat-OpenID") != "bob" {
			t.Errorf("jose's token %s: %d %s", name, out.Code, out.Body)
		}
	}
	for name, token := range theirs.Wrong {
		if out := ask(token); out.Code != http.StatusUnauthorized {
			t.Errorf("jose's token %s: %d %s", name, out.Code, out.Body)
		}
	}
}
