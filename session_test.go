package main

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net/http"
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
	if got != "dBjftJeZ4CVP-mB92K27uhbUJU1p1r_wW1gFWFOEjXk" {
		t.Errorf("signature %q", got)
	}
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
		want := session{Issuer: s.issuer, Audience: "wx1", OpenID: "o1", UnionID: "u1", Nickname: nasty,
			Avatar: who.Avatar, ID: "id", IssuedAt: now.Unix(), Expires: now.Add(24 * time.Hour).Unix()}
		if *got != want {
			t.Errorf("%+v, want %+v", *got, want)
		}
		time.Sleep(time.Second)
		if _, err := s.verify(token); err != errNoSession {
			t.Errorf("at its end: %v", err)
		}
	})
}

func TestSecretsCanBeChanged(t *testing.T) {
	during, after := testSigner(secretB, secretA), testSigner(secretB)
	old, _ := testSigner(secretA).sign(login{OpenID: "o"}, time.Now(), "1")
	renewed, _ := during.sign(login{OpenID: "o"}, time.Now(), "2")
	for name, test := range map[string]struct {
		s     *signer
		token string
		ok    bool
	}{
		"the old secret's token, while both hold": {during, old, true},
		"the new secret's token, afterwards":      {after, renewed, true},
		"the old secret's token, afterwards":      {after, old, false},
	} {
		if _, err := test.s.verify(test.token); (err == nil) != test.ok {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestVerifyTakesNothingElse(t *testing.T) {
	s, now := testSigner(secretA), time.Now().Unix()
	const iss, aud, sub = `"iss":"https://login.example.com"`, `"aud":"wx1"`, `"sub":"o1"`
	exp := fmt.Sprintf(`"exp":%d`, now+3600)
	signed := func(claims ...string) string {
		return forge(secretA, jwtHeader, "{"+strings.Join(claims, ",")+"}")
	}
	good := signed(iss, aud, sub, exp)
	parts := strings.Split(good, ".")
	others := strings.Split(signed(iss, aud, `"sub":"o2"`, exp), ".")
	claims := "{" + strings.Join([]string{iss, aud, sub, exp}, ",") + "}"
	for _, token := range []string{good, signed(iss, aud, sub, exp, fmt.Sprintf(`"nbf":%d`, now))} {
		if _, err := s.verify(token); err != nil {
			t.Errorf("a right token: %v", err)
		}
	}
	for name, token := range map[string]string{
		"empty":               "",
		"no signature":        parts[0] + "." + parts[1] + ".",
		"four parts":          good + ".x",
		"another spelling":    good[:len(good)-1] + string(good[len(good)-1]+1),
		"padded":              parts[0] + "=." + parts[1] + "." + parts[2],
		"other claims":        parts[0] + "." + others[1] + "." + parts[2],
		"another secret":      forge(secretB, jwtHeader, claims),
		"the empty secret":    forge("", jwtHeader, claims),
		"alg none":            forge(secretA, `{"alg":"none"}`, claims),
		"alg HS384":           forge(secretA, `{"alg":"HS384"}`, claims),
		"no alg":              forge(secretA, `{}`, claims),
		"unknown crit":        forge(secretA, `{"alg":"HS256","crit":["b64"]}`, claims),
		"wrong iss":           signed(`"iss":"https://evil.example.com"`, aud, sub, exp),
		"wrong aud":           signed(iss, `"aud":"wx2"`, sub, exp),
		"aud in a list":       signed(iss, `"aud":["wx1"]`, sub, exp),
		"no sub":              signed(iss, aud, exp),
		"no exp":              signed(iss, aud, sub),
		"expired":             signed(iss, aud, sub, fmt.Sprintf(`"exp":%d`, now)),
		"exp of a wrong type": signed(iss, aud, sub, `"exp":"never"`),
		"before its nbf":      signed(iss, aud, sub, exp, fmt.Sprintf(`"nbf":%d`, now+60)),
		"no JSON":             forge(secretA, jwtHeader, "x"),
	} {
		if claims, err := s.verify(token); err != errNoSession || claims != nil {
			t.Errorf("%s: %+v, %v", name, claims, err)
		}
	}
}

// FuzzSession: only the token that we signed verifies.
func FuzzSession(f *testing.F) {
	s := testSigner(secretA)
	at := time.Date(2100, 1, 1, 0, 0, 0, 0, time.UTC) // the same in every process
	token, _ := s.sign(login{OpenID: "o"}, at, "1")
	f.Add(token)
	f.Add("a.b.c")
	f.Fuzz(func(t *testing.T, got string) {
		if _, err := s.verify(got); err == nil && got != token {
			t.Errorf("forged: %q", got)
		}
	})
}

func TestSessionOfALogin(t *testing.T) {
	const profile = `{"openid":"alice","unionid":"union-alice","nickname":"alice","avatar":"%s/demo/avatar.svg",` +
		`"expiresAt":`
	for publicURL, name := range map[string]string{
		"http://login.example.com": "wxscan_session", "https://login.example.com": "__Host-wxscan_session"} {
		w := newWorld(t, "PUBLIC_URL="+publicURL, "WECHAT_SCOPE=snsapi_userinfo")
		qr := w.begin(t, "getauthqr")
		w.scan(qr.Ticket, "alice", "")
		out := w.do("GET", "/wechat/checklogin?ticket="+qr.Ticket, "")
		var answer pollAnswer
		must(t, json.Unmarshal(out.Body.Bytes(), &answer))
		want := name + "=" + answer.Token + "; Path=/; Max-Age=86400; HttpOnly; "
		if name != "wxscan_session" {
			want += "Secure; "
		}
		if got := out.Header()["Set-Cookie"]; len(got) != 1 || got[0] != want+"SameSite=Lax" {
			t.Errorf("cookies %q, want %q", got, want+"SameSite=Lax")
		}
		cookie, bearer := name+"="+answer.Token, "Bearer "+answer.Token
		for _, headers := range [][]string{
			{"Cookie", cookie}, {"Authorization", bearer}, {"Cookie", name + "=x; " + cookie},
			{"Authorization", "Bearer of-the-application", "Cookie", cookie},
		} {
			out := w.do("GET", "/wechat/session", "", headers...)
			header := out.Header()
			if out.Code != 200 || !strings.HasPrefix(out.Body.String(), fmt.Sprintf(profile, publicURL)) ||
				header.Get("X-WeChat-OpenID") != "alice" || header.Get("X-WeChat-UnionID") != "union-alice" {
				t.Errorf("%d %s, %v", out.Code, out.Body, header)
			}
		}
		for _, header := range [][]string{{}, {"Cookie", "session=" + answer.Token},
			{"Authorization", "Bearer x"}, {"Authorization", "Basic " + answer.Token}} {
			out := w.do("GET", "/wechat/session", "", header...)
			if out.Code != 401 || !strings.Contains(out.Body.String(), "no_session") ||
				out.Header().Get("X-WeChat-OpenID") != "" {
				t.Errorf("%q: %d %s", header, out.Code, out.Body)
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

func TestLogout(t *testing.T) {
	w := newWorld(t)
	for _, test := range []struct {
		site   string
		status int
		cookie string
	}{
		{"same-origin", 204, "wxscan_session=; Path=/; Max-Age=0; HttpOnly; SameSite=Lax"},
		{"cross-site", 403, ""}, {"same-site", 403, ""},
	} {
		out := w.do("POST", "/wechat/logout", "", "Sec-Fetch-Site", test.site)
		if got := out.Header().Get("Set-Cookie"); out.Code != test.status || got != test.cookie {
			t.Errorf("%s: %d %q, want %+v", test.site, out.Code, got, test)
		}
	}
	if out := w.do("GET", "/wechat/logout", ""); out.Code != 405 {
		t.Errorf("GET: %d", out.Code)
	}
}

func TestOtherOrigins(t *testing.T) {
	const front = "https://www.example.com"
	open, closed := newWorld(t, "ALLOWED_ORIGINS="+front+",http://localhost:3000"), newWorld(t)
	ask := func(w *world, method, path, origin string) http.Header {
		return w.do(method, path, "", "Origin", origin, "Sec-Fetch-Site", "cross-site").Header()
	}
	shut := func(w *world, method, path, origin string) {
		t.Helper()
		if got := ask(w, method, path, origin).Get("Access-Control-Allow-Origin"); got != "" {
			t.Errorf("%s %s from %s: allowed %q", method, path, origin, got)
		}
	}
	for _, path := range []string{"/wechat/getloginqr", "/wechat/getauthqr", "/wechat/checklogin", "/wechat/session"} {
		for _, method := range []string{"GET", "OPTIONS"} {
			header := ask(open, method, path, front)
			if header.Get("Access-Control-Allow-Origin") != front || header.Get("Vary") != "Origin" ||
				header.Get("Access-Control-Allow-Credentials") != "true" {
				t.Errorf("%s %s: %v", method, path, header)
			}
			for _, origin := range []string{"null", front + ".evil.com", "http://www.example.com", "*"} {
				shut(open, method, path, origin)
			}
			shut(closed, method, path, front)
		}
	}
	for _, path := range []string{"/wechat/logout", "/wechat/message", "/wechat/qr.png", "/", "/wechat/confirm"} {
		shut(open, "GET", path, front)
	}
}
