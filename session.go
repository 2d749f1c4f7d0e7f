package main

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"net/http"
	"slices"
	"strings"
	"time"
)

// errNoSession is every way in which a session can be missing or wrong.
var errNoSession = errors.New("no valid session")

// A session is a login that others can verify: the claims of a JWT (RFC 7519).
type session struct {
	Issuer   string `json:"iss"` // our public URL
	Audience string `json:"aud"` // the appid
	OpenID   string `json:"sub"`
	IssuedAt int64  `json:"iat"` // Unix seconds, as the next two
	Expires  int64  `json:"exp"`
	Begins   int64  `json:"nbf,omitzero"` // ours have none
	ID       string `json:"jti"`
	UnionID  string `json:"unionid,omitzero"`
	Nickname string `json:"name,omitzero"`
	Avatar   string `json:"picture,omitzero"`
}

// A signer makes and verifies sessions, signed by HS256 (RFC 7518).
type signer struct {
	secrets          []string // the first signs, all verify
	issuer, audience string
	ttl              time.Duration // whole seconds
	allowedOrigins   []string      // of other front ends
}

const jwtHeader = `{"alg":"HS256","typ":"JWT"}`

// sign returns the token of a login at the given time; the same login always has
// the same token. id must belong to this login alone, and be no secret.
func (s *signer) sign(who login, at time.Time, id string) (string, error) {
	claims, err := json.Marshal(session{
		Issuer: s.issuer, Audience: s.audience, OpenID: who.OpenID,
		IssuedAt: at.Unix(), Expires: at.Add(s.ttl).Unix(), ID: id,
		UnionID: who.UnionID, Nickname: who.Nickname, Avatar: who.Avatar,
	})
	encode := base64.RawURLEncoding.EncodeToString
	signed := encode([]byte(jwtHeader)) + "." + encode(claims)
	return signed + "." + encode(mac(s.secrets[0], signed)), err
}

// verify returns the session that a token holds, or errNoSession. Whatever its
// header says, the signature must be HS256 by one of our secrets.
func (s *signer) verify(token string) (*session, error) {
	head, rest, _ := strings.Cut(token, ".")
	body, sum, _ := strings.Cut(rest, ".")
	got, err := base64.RawURLEncoding.Strict().DecodeString(sum)
	signed := err == nil && slices.ContainsFunc(s.secrets, func(secret string) bool {
		return hmac.Equal(got, mac(secret, head+"."+body))
	})
	var header struct {
		Alg  string          `json:"alg"`
		Crit json.RawMessage `json:"crit"` // extensions that must be understood: we know none
	}
	claims, now := new(session), time.Now().Unix()
	if !signed || decodeSegment(head, &header) != nil || decodeSegment(body, claims) != nil ||
		header.Alg != "HS256" || header.Crit != nil ||
		claims.Issuer != s.issuer || claims.Audience != s.audience || claims.OpenID == "" ||
		now < claims.Begins || now >= claims.Expires {
		return nil, errNoSession
	}
	return claims, nil
}

func mac(secret, text string) []byte {
	h := hmac.New(sha256.New, []byte(secret))
	h.Write([]byte(text))
	return h.Sum(nil)
}

func decodeSegment(segment string, v any) error {
	data, err := base64.RawURLEncoding.Strict().DecodeString(segment)
	if err != nil {
		return err
	}
	return json.Unmarshal(data, v)
}

// cookie returns the cookie that carries a session; an empty token deletes it.
// Under https its name ties it to this host alone.
func (s *signer) cookie(token string) *http.Cookie {
	c := &http.Cookie{Name: "wxscan_session", Value: token, Path: "/", MaxAge: int(s.ttl.Seconds()),
		HttpOnly: true, SameSite: http.SameSiteLaxMode}
	if strings.HasPrefix(s.issuer, "https:") {
		c.Name, c.Secure = "__Host-wxscan_session", true
	}
	if token == "" {
		c.MaxAge = -1
	}
	return c
}

// mayKeep tells whether the browser that polls may keep the session as a cookie.
// Any page can make a browser load the URL of a poll, with the ticket of the page's
// own login, and so log that browser in as somebody else. SameSite stops neither a
// page of a sibling domain nor a link or picture posted on our own site. So the
// request must be a script's fetch, from a page of ours or of an allowed origin, or
// come without Sec-Fetch-Site, as from curl and old browsers.
func (s *signer) mayKeep(r *http.Request) bool {
	header := r.Header
	dest, origin, from := header.Get("Sec-Fetch-Dest"), header.Get("Origin"), header.Get("Sec-Fetch-Site")
	isLink := header.Get("Sec-Fetch-Mode") == "navigate" || strings.Contains(header.Get("Accept"), "text/html")
	switch {
	case isLink, dest != "" && dest != "empty":
		return false
	case from == "same-origin", from == "" && (origin == "" || origin == s.issuer):
		return true
	}
	return slices.Contains(s.allowedOrigins, origin)
}

// fromRequest returns the session of a request, from its Authorization or its
// cookie, else errNoSession.
func (s *signer) fromRequest(r *http.Request) (*session, error) {
	if token, ok := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer "); ok {
		if claims, err := s.verify(token); err == nil {
			return claims, nil // else it may be the application's own token
		}
	}
	for _, c := range r.CookiesNamed(s.cookie("").Name) {
		if claims, err := s.verify(c.Value); err == nil {
			return claims, nil
		}
	}
	return nil, errNoSession
}

// session tells whose session a request comes with: for applications, and for
// the auth_request of nginx and its like, which look at the status and headers.
func (s *server) session(w http.ResponseWriter, r *http.Request) error {
	claims, err := s.signer.fromRequest(r)
	if err != nil {
		return err
	}
	w.Header().Set("X-WeChat-OpenID", claims.OpenID)
	w.Header().Set("X-WeChat-UnionID", claims.UnionID)
	return writeJSON(w, http.StatusOK, struct {
		login
		ExpiresAt int64 `json:"expiresAt"` // Unix seconds
	}{login{claims.OpenID, claims.UnionID, claims.Nickname, claims.Avatar}, claims.Expires})
}

// logout makes the browser forget its session. The token itself, where it was
// copied, is good until it expires: there is no list of sessions.
func (s *server) logout(w http.ResponseWriter, r *http.Request) error {
	http.SetCookie(w, s.signer.cookie(""))
	w.WriteHeader(http.StatusNoContent)
	return nil
}
