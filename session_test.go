package main

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

const secretA, secretB = "0123456789abcdef0123456789abcdef", "fedcba9876543210fedcba9876543210"

func testSigner(secrets ...string) *signer {
	return &signer{secrets: secrets, issuer: "https://login.example.com", audience: "wx1", ttl: 24 * time.Hour}
}

// forge signs any header and claims with secret.
func forge(secret, header, claims string) string {
	encode := base64.RawURLEncoding.EncodeToString
	signed := encode([]byte(header)) + "." + encode([]byte(claims))
	return signed + "." + encode(mac(secret, signed))
}

func TestJWTKnownAnswer(t *testing.T) {
	// RFC 7515, appendix A.1: the signature of its example by its key.
	const secret = "AyM1SysPpbyDfgZld3umj1qzKObwVMkoqQ-EstJQLr_T-1qS0gZH75aKtMN3Yj0iPS4hcgUuTwjAzZr1Z9CAow"
	const signed = "eyJ0eXAiOiJKV1QiLA0KICJhbGciOiJIUzI1NiJ9." +
		"eyJpc3MiOiJqb2UiLA0KICJleHAiOjEzMDA4MTkzODAsDQogImh0dHA6Ly9leGFtcGxlLmNvbS9pc19yb290Ijp0cnVlfQ"
	key, err := base64.RawURLEncoding.DecodeString(secret)
	must(t, err)
	got := base64.RawURLEncoding.EncodeToString(mac(string(key), signed))
	equal(t, "signature", got, "dBjftJeZ4CVP-mB92K27uhbUJU1p1r_wW1gFWFOEjXk")
}

func TestSessionIsReadBackUntilItExpires(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, now := testSigner(secretA), time.Now()
		who := login{OpenID: "o1", UnionID: "u1", Nickname: nasty, Avatar: "https://thirdwx.qlogo.cn/1"}
		token, err := s.sign(who, now, "id")
		must(t, err)
		time.Sleep(24*time.Hour - time.Second)
		got, err := s.verify(token)
		must(t, err)
		equal(t, "session", *got, session{Issuer: s.issuer, Audience: "wx1", OpenID: "o1", UnionID: "u1",
			Nickname: nasty, Avatar: who.Avatar, ID: "id", IssuedAt: now.Unix(), Expires: now.Unix() + 24*60*60})
		time.Sleep(time.Second)
		if _, err := s.verify(token); err != errNoSession {
			t.Errorf("at its end: %v", err)
		}
	})
}

func TestVerifyTakesNothingElse(t *testing.T) {
	s, changing := testSigner(secretA), testSigner(secretB, secretA) // from the one secret to the other
	exp := fmt.Sprintf(`"exp":%d`, time.Now().Unix()+3600)
	claims := `{"iss":"https://login.example.com","aud":"wx1","sub":"o1",` + exp + `}`
	but := func(old, new string) string { return forge(secretA, jwtHeader, strings.Replace(claims, old, new, 1)) }
	good := but("", "")
	renewed, err := changing.sign(login{OpenID: "o1"}, time.Now(), "1")
	must(t, err)
	parts, others := strings.Split(good, "."), strings.Split(but("o1", "o2"), ".")
	for name, test := range map[string]struct {
		s     *signer
		token string
	}{
		"a right token": {s, good}, "after its nbf": {s, but(exp, exp+`,"nbf":1`)},
		"the old secret's": {changing, good}, "the new secret's": {testSigner(secretB), renewed},
	} {
		if _, err := test.s.verify(test.token); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	for name, token := range map[string]string{
		"empty":               "",
		"no signature":        parts[0] + "." + parts[1] + ".",
		"four parts":          good + ".x",
		"another spelling":    good[:len(good)-1] + string(good[len(good)-1]+1),
		"padded":              parts[0] + "=." + parts[1] + "." + parts[2],
		"other claims":        parts[0] + "." + others[1] + "." + parts[2],
		"another secret":      renewed,
		"the empty secret":    forge("", jwtHeader, claims),
		"alg none":            forge(secretA, `{"alg":"none"}`, claims),
		"no alg":              forge(secretA, `{}`, claims),
		"unknown crit":        forge(secretA, `{"alg":"HS256","crit":["b64"]}`, claims),
		"wrong iss":           but("login.", "evil."),
		"wrong aud":           but("wx1", "wx2"),
		"aud in a list":       but(`"wx1"`, `["wx1"]`),
		"no sub":              but(`"sub":"o1",`, ""),
		"no exp":              but(","+exp, ""),
		"expired":             but(exp, fmt.Sprintf(`"exp":%d`, time.Now().Unix())),
		"exp of a wrong type": but(exp, `"exp":"never"`),
		"before its nbf":      but(exp, fmt.Sprintf(`%s,"nbf":%d`, exp, time.Now().Unix()+60)),
		"no JSON":             forge(secretA, jwtHeader, "x"),
	} {
		if claims, err := s.verify(token); err != errNoSession || claims != nil {
			t.Errorf("%s: %+v, %v", name, claims, err)
		}
	}
}

func TestSessionOfALogin(t *testing.T) {
	for publicURL, name := range map[string]string{
		"http://login.example.com": "wxscan_session", "https://login.example.com": "__Host-wxscan_session"} {
		w := newWorld(t, "PUBLIC_URL="+publicURL, "WECHAT_SCOPE=snsapi_userinfo")
		qr := w.begin(t, "getauthqr")
		w.scan(qr.Ticket, "alice", "")
		token, attributes := w.check(t, qr.Ticket, "").Token, "HttpOnly; SameSite=Lax"
		if strings.HasPrefix(publicURL, "https") {
			attributes = "HttpOnly; Secure; SameSite=Lax"
		}
		kept := w.do("GET", "/wechat/checklogin?ticket="+qr.Ticket, "").Header().Get("Set-Cookie")
		equal(t, "kept", kept, name+"="+token+"; Path=/; Max-Age=86400; "+attributes)
		left := w.do("POST", "/wechat/logout", "").Header().Get("Set-Cookie")
		equal(t, "after the logout", left, name+"=; Path=/; Max-Age=0; "+attributes)
		const none = `401 "" "" {"error":"no_session","message":"not logged in, or no longer"}`
		cookie, alice := name+"="+token, `200 "alice" "union-alice" {"openid":"alice","unionid":"union-alice",`+
			`"nickname":"alice","avatar":"`+publicURL+`/static/demo/avatar.svg","expiresAt":`
		for _, test := range []struct{ authorization, cookie, want string }{
			{"", cookie, alice},
			{"Bearer " + token, "", alice},
			{"", name + "=x; " + cookie, alice},
			{"Bearer of-the-application", cookie, alice},
			{"", "", none},
			{"", "session=" + token, none},
			{"Bearer x", "", none},
			{"Basic " + token, "", none},
		} {
			out := w.do("GET", "/wechat/session", "", "Authorization", test.authorization, "Cookie", test.cookie)
			openID, unionID := out.Header().Get("X-WeChat-OpenID"), out.Header().Get("X-WeChat-UnionID")
			got := fmt.Sprintf("%d %q %q %s", out.Code, openID, unionID, out.Body)
			if !strings.HasPrefix(got, test.want) {
				t.Errorf("%q, %q: %s, want %s", test.authorization, test.cookie, got, test.want)
			}
		}
	}
}

func TestDemosSessionsAreNotProductions(t *testing.T) {
	w := newWorld(t, "SESSION_SECRET="+secretA)
	qr := w.begin(t, "getauthqr")
	w.scan(qr.Ticket, "alice", "")
	production := &signer{secrets: []string{secretA}, issuer: w.config.publicURL, audience: w.config.appID}
	if claims, err := production.verify(w.check(t, qr.Ticket, "").Token); err != errNoSession {
		t.Errorf("production takes the demo's session of %+v, %v", claims, err)
	}
}

// joseScript verifies our token by https://github.com/panva/jose, and makes others.
const joseScript = `
import { jwtVerify, SignJWT } from "jose";
const { token, secret, former, iss, aud } = JSON.parse(process.argv[1]);
const key = (text) => new TextEncoder().encode(text);
const read = (secret, aud) => jwtVerify(token, key(secret), { issuer: iss, audience: aud, algorithms: ["HS256"],
  requiredClaims: ["sub", "iat", "exp", "jti"] }).then((read) => read.payload.sub, (err) => err.code);
const sign = (claims, secret) => new SignJWT({ iss, aud, sub: "bob", ...claims })
  .setProtectedHeader({ alg: "HS256" }).setIssuedAt().setExpirationTime("1h").sign(key(secret));
console.log(JSON.stringify({
  read: [await read(secret, aud), await read("x".repeat(32), aud), await read(secret, "wx0")],
  right: [await sign({}, secret), await sign({ scope: "x", name: "鲍勃" }, former)],
  wrong: [await sign({}, "x".repeat(32)), await sign({ aud: "wx0" }, secret), await sign({ aud: [aud] }, secret)],
}));
`

// TestJoseAndWeReadEachOthersTokens needs the folder WXSCAN_JOSE, in which
// npm install jose was run.
func TestJoseAndWeReadEachOthersTokens(t *testing.T) {
	node, folder := program(t, "node", "nodejs"), os.Getenv("WXSCAN_JOSE")
	if folder == "" && os.Getenv("WXSCAN_E2E") == "" {
		t.Skip("WXSCAN_JOSE is not set: the folder in which npm install jose was run")
	}
	s := testSigner(secretA, secretB)
	token, err := s.sign(login{OpenID: "alice", Nickname: nasty}, time.Now(), "1")
	must(t, err)
	given, err := json.Marshal(object{"token": token, "secret": secretA, "former": secretB, "iss": s.issuer,
		"aud": s.audience})
	must(t, err)
	cmd := exec.CommandContext(t.Context(), node, "--input-type=module", "-e", joseScript, string(given))
	cmd.Dir, cmd.Stderr = folder, t.Output()
	printed, err := cmd.Output()
	must(t, err)
	var theirs struct{ Read, Right, Wrong []string }
	must(t, json.Unmarshal(printed, &theirs))
	equal(t, "jose reads our token, with another secret, for another audience", strings.Join(theirs.Read, " "),
		"alice ERR_JWS_SIGNATURE_VERIFICATION_FAILED ERR_JWT_CLAIM_VALIDATION_FAILED")
	for i, token := range slices.Concat(theirs.Right, theirs.Wrong) {
		if claims, err := s.verify(token); (err == nil) != (i < 2) || err == nil && claims.OpenID != "bob" {
			t.Errorf("jose's token %d: %+v, %v", i, claims, err)
		}
	}
}
