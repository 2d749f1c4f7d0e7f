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
	signed := base64.RawURLEncoding.EncodeToString([]byte(header)) + "." + base64.RawURLEncoding.EncodeToString([]byte(claims))
	return signed + "." + base64.RawURLEncoding.EncodeToString(mac(secret, signed))
}

func TestJWTKnownAnswer(t *testing.T) {
	// RFC 7515, appendix A.1: the signature of its example by its key.
	key, err := base64.RawURLEncoding.DecodeString("AyM1SysPpbyDfgZld3umj1qzKObwVMkoqQ-EstJQLr_T-1qS0gZH75aKtMN3Yj0iPS4hcgUuTwjAzZr1Z9CAow")
	must(t, err)
	const signed = "eyJ0eXAiOiJKV1QiLA0KICJhbGciOiJIUzI1NiJ9.eyJpc3MiOiJqb2UiLA0KICJleHAiOjEzMDA4MTkzODAsDQogImh0dHA6Ly9leGFtcGxlLmNvbS9pc19yb290Ijp0cnVlfQ"
	if got := base64.RawURLEncoding.EncodeToString(mac(string(key), signed)); got != "dBjftJeZ4CVP-mB92K27uhbUJU1p1r_wW1gFWFOEjXk" {
		t.Errorf("signature %q", got)
	}
}

func TestSessionIsReadBackUntilItExpires(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := testSigner(secretA)
		who := login{OpenID: "o1", UnionID: "u1", Nickname: nasty, Avatar: "https://thirdwx.qlogo.cn/1"}
		token, err := s.sign(who, time.Now(), "id")
		must(t, err)
		time.Sleep(24*time.Hour - time.Second)
		got, err := s.verify(token)
		must(t, err)
		want := session{Issuer: s.issuer, Audience: "wx1", OpenID: "o1", UnionID: "u1", Nickname: nasty, Avatar: who.Avatar, ID: "id",
			IssuedAt: time.Now().Add(time.Second - 24*time.Hour).Unix(), Expires: time.Now().Add(time.Second).Unix()}
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
	before, during, after := testSigner(secretA), testSigner(secretB, secretA), testSigner(secretB)
	old, _ := before.sign(login{OpenID: "o"}, time.Now(), "1")
	renewed, _ := during.sign(login{OpenID: "o"}, time.Now(), "2")
	for name, test := range map[string]struct {
		s     *signer
		token string
		ok    bool
	}{
		"the old secret's token, while both hold": {during, old, true},
		"the new secret's token, while both hold": {during, renewed, true},
		"the new secret's token, afterwards":      {after, renewed, true},
		"the old secret's token, afterwards":      {after, old, false},
		"the new secret's token, before":          {before, renewed, false},
	} {
		if _, err := test.s.verify(test.token); (err == nil) != test.ok {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestVerifyTakesNothingElse(t *testing.T) {
	s := testSigner(secretA)
	future := time.Now().Add(time.Hour).Unix()
	claims := fmt.Sprintf(`{"iss":"https://login.example.com","aud":"wx1","sub":"o1","exp":%d}`, future)
	if _, err := s.verify(forge(secretA, jwtHeader, claims)); err != nil {
		t.Fatalf("the right claims: %v", err)
	}
	if _, err := s.verify(forge(secretA, jwtHeader, strings.Replace(claims, `"exp"`, fmt.Sprintf(`"nbf":%d,"exp"`, time.Now().Unix()), 1))); err != nil {
		t.Errorf("from its nbf on: %v", err)
	}
	good := forge(secretA, jwtHeader, claims)
	parts := strings.Split(good, ".")
	for name, token := range map[string]string{
		"empty":                 "",
		"dots":                  "..",
		"no signature":          parts[0] + "." + parts[1] + ".",
		"cut off":               good[:len(good)-1],
		"four parts":            good + ".x",
		"another spelling":      good[:len(good)-1] + string(good[len(good)-1]+1),
		"other claims":          parts[0] + "." + base64.RawURLEncoding.EncodeToString([]byte(strings.Replace(claims, "o1", "o2", 1))) + "." + parts[2],
		"another secret":        forge(secretB, jwtHeader, claims),
		"alg none":              forge(secretA, `{"alg":"none"}`, claims),
		"alg none, unsigned":    base64.RawURLEncoding.EncodeToString([]byte(`{"alg":"none"}`)) + "." + parts[1] + ".",
		"alg HS384":             forge(secretA, `{"alg":"HS384"}`, claims),
		"alg RS256":             forge(secretA, `{"alg":"RS256"}`, claims),
		"no alg":                forge(secretA, `{}`, claims),
		"alg of a wrong type":   forge(secretA, `{"alg":["HS256"]}`, claims),
		"unknown crit":          forge(secretA, `{"alg":"HS256","crit":["b64"]}`, claims),
		"wrong iss":             forge(secretA, jwtHeader, strings.Replace(claims, "login.", "evil.", 1)),
		"wrong aud":             forge(secretA, jwtHeader, strings.Replace(claims, "wx1", "wx2", 1)),
		"aud in a list":         forge(secretA, jwtHeader, strings.Replace(claims, `"wx1"`, `["wx1"]`, 1)),
		"no sub":                forge(secretA, jwtHeader, strings.Replace(claims, `"sub"`, `"x"`, 1)),
		"no exp":                forge(secretA, jwtHeader, strings.Replace(claims, `"exp"`, `"x"`, 1)),
		"expired":               forge(secretA, jwtHeader, strings.Replace(claims, fmt.Sprint(future), fmt.Sprint(time.Now().Unix()), 1)),
		"before its nbf":        forge(secretA, jwtHeader, strings.Replace(claims, `"exp"`, fmt.Sprintf(`"nbf":%d,"exp"`, time.Now().Unix()+60), 1)),
		"nbf of a wrong type":   forge(secretA, jwtHeader, strings.Replace(claims, `"exp"`, `"nbf":"now","exp"`, 1)),
		"exp of a wrong type":   forge(secretA, jwtHeader, strings.Replace(claims, fmt.Sprint(future), `"never"`, 1)),
		"no JSON":               forge(secretA, jwtHeader, "x"),
		"null":                  forge(secretA, jwtHeader, "null"),
		"padded":                parts[0] + "=." + parts[1] + "." + parts[2],
		"with the empty secret": forge("", jwtHeader, claims),
	} {
		if claims, err := s.verify(token); err != errNoSession || claims != nil {
			t.Errorf("%s: %+v, %v", name, claims, err)
		}
	}
}

// FuzzSession: only the token that we signed verifies.
func FuzzSession(f *testing.F) {
	s := testSigner(secretA)
	token, _ := s.sign(login{OpenID: "o"}, time.Date(2100, 1, 1, 0, 0, 0, 0, time.UTC), "1") // the same in every process
	f.Add(token)
	f.Add("a.b.c")
	f.Fuzz(func(t *testing.T, got string) {
		if _, err := s.verify(got); err == nil && got != token {
			t.Errorf("forged: %q", got)
		}
	})
}

func TestSessionOfALogin(t *testing.T) {
	for publicURL, name := range map[string]string{"http://login.example.com": "wxscan_session", "https://login.example.com": "__Host-wxscan_session"} {
		w := newWorld(t, "PUBLIC_URL="+publicURL, "WECHAT_SCOPE=snsapi_userinfo")
		qr := w.begin(t, "getauthqr")
		w.scan(qr.Ticket, "alice", "")
		out := w.do("GET", "/wechat/checklogin?ticket="+qr.Ticket, "")
		var answer pollAnswer
		must(t, json.Unmarshal(out.Body.Bytes(), &answer))
		cookies := out.Result().Cookies()
		if len(cookies) != 1 {
			t.Fatalf("%d cookies", len(cookies))
		}
		if c := cookies[0]; c.Name != name || c.Value != answer.Token || !c.HttpOnly || c.SameSite != http.SameSiteLaxMode || c.Path != "/" || c.Domain != "" ||
			c.Secure != strings.HasPrefix(publicURL, "https") || c.MaxAge != 24*60*60 {
			t.Errorf("cookie %+v", c)
		}
		for _, headers := range [][]string{{"Cookie", name + "=" + answer.Token}, {"Authorization", "Bearer " + answer.Token}, {"Cookie", name + "=x; " + name + "=" + answer.Token},
			{"Authorization", "Bearer of-the-application", "Cookie", name + "=" + answer.Token}} {
			out := w.do("GET", "/wechat/session", "", headers...)
			want := fmt.Sprintf(`{"openid":"alice","unionid":"union-alice","nickname":"alice","avatar":"%s/demo/avatar.svg","expiresAt":`, publicURL)
			if out.Code != 200 || !strings.HasPrefix(out.Body.String(), want) || out.Header().Get("X-WeChat-OpenID") != "alice" || out.Header().Get("X-WeChat-UnionID") != "union-alice" {
				t.Errorf("%d %s, %v", out.Code, out.Body, out.Header())
			}
		}
		for _, header := range [][2]string{{"X", ""}, {"Cookie", "session=" + answer.Token}, {"Authorization", answer.Token}, {"Authorization", "Bearer x"}, {"Authorization", "Basic " + answer.Token}} {
			if out := w.do("GET", "/wechat/session", "", header[0], header[1]); out.Code != 401 || !strings.Contains(out.Body.String(), "no_session") || out.Header().Get("X-WeChat-OpenID") != "" {
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
	if out := w.do("POST", "/wechat/logout", "", "Sec-Fetch-Site", "same-origin"); out.Code != 204 || len(out.Result().Cookies()) != 1 || out.Result().Cookies()[0].MaxAge >= 0 {
		t.Errorf("%d %v", out.Code, out.Result().Cookies())
	}
	for _, site := range []string{"cross-site", "same-site"} {
		if out := w.do("POST", "/wechat/logout", "", "Sec-Fetch-Site", site); out.Code != 403 || len(out.Result().Cookies()) != 0 {
			t.Errorf("%s: %d", site, out.Code)
		}
	}
	if out := w.do("GET", "/wechat/logout", ""); out.Code != 405 {
		t.Errorf("GET: %d", out.Code)
	}
}

func TestOtherOrigins(t *testing.T) {
	ask := func(w *world, method, path, origin string) http.Header {
		return w.do(method, path, "", "Origin", origin, "Sec-Fetch-Site", "cross-site").Header()
	}
	const front = "https://www.example.com"
	open, closed := newWorld(t, "ALLOWED_ORIGINS="+front+",http://localhost:3000"), newWorld(t)
	for _, path := range []string{"/wechat/getloginqr", "/wechat/getauthqr", "/wechat/checklogin", "/wechat/session"} {
		for _, method := range []string{"GET", "OPTIONS"} {
			header := ask(open, method, path, front)
			if header.Get("Access-Control-Allow-Origin") != front || header.Get("Access-Control-Allow-Credentials") != "true" || header.Get("Vary") != "Origin" {
				t.Errorf("%s %s: %v", method, path, header)
			}
			for _, origin := range []string{"https://evil.com", "null", "https://www.example.com.evil.com", "http://www.example.com", "*"} {
				if got := ask(open, method, path, origin).Get("Access-Control-Allow-Origin"); got != "" {
					t.Errorf("%s from %s: allowed %q", path, origin, got)
				}
			}
			if header := ask(closed, method, path, front); header.Get("Access-Control-Allow-Origin") != "" {
				t.Errorf("%s: open by default", path)
			}
		}
	}
	for _, path := range []string{"/wechat/logout", "/wechat/message", "/wechat/qr.png", "/", "/healthz", "/wechat/confirm"} {
		if got := ask(open, "GET", path, front).Get("Access-Control-Allow-Origin"); got != "" {
			t.Errorf("%s is open to %s", path, got)
		}
	}
}
