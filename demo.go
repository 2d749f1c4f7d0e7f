package main

import (
	"crypto/rand"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"maps"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"time"
)

// A demo simulates WeChat, as far as wxscan needs it: the API, the pushes, and the
// phone of any person. It enforces WeChat's rules, so that our mistakes show.
type demo struct {
	*http.ServeMux
	config  config
	tickets *store       // for what a camera reads off a ticket's QR code
	client  *http.Client // for pushes and callbacks
	server  string       // where these go: to the program itself, over loopback

	calls  sync.Mutex // held while a call of the API is worked out; guards the two below
	stable string     // the last stable access token
	plain  string     // the last plain one

	mu     sync.Mutex       // guards grants
	grants map[string]grant // by what was issued
}

// A grant is something that the simulator has issued, and remembers.
type grant struct {
	kind    string // token, qr (by the id in its URL), ticket, code, used (a code), or user: a user's own token
	expires time.Time
	of      string // qr: ticket; ticket: URL; code, user: openid
	scope   string // qr: scene; code, user: scope
	virtual bool   // code: of a snapshot page's user
}

const maxGrants = 100_000 // bounds the memory of a simulator that strangers can reach

// An apiCall is a call of the API: its query, and the fields of its body.
type apiCall struct {
	url.Values
	isMalformed   bool   // the body is not JSON
	GrantType     string `json:"grant_type"`
	AppID         string `json:"appid"`
	Secret        string `json:"secret"`
	ExpireSeconds int    `json:"expire_seconds"`
	ActionName    string `json:"action_name"`
	ActionInfo    struct {
		Scene struct {
			SceneStr string `json:"scene_str"`
		} `json:"scene"`
	} `json:"action_info"`
}

// newDemo returns the simulator of the account of c.
func newDemo(c config, client *http.Client, tickets *store) *demo {
	d := &demo{ServeMux: http.NewServeMux(), config: c, tickets: tickets, client: client,
		server: strings.TrimSuffix(c.apiBase, "/demo"), grants: make(map[string]grant)}
	api := func(pattern string, h func(apiCall) object) {
		d.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) {
			call := apiCall{Values: r.URL.Query()}
			call.isMalformed = json.NewDecoder(r.Body).Decode(&call) != nil
			d.calls.Lock()
			answer := h(call)
			d.calls.Unlock()
			w.Header().Set("Content-Type", "text/plain") // as WeChat does
			json.NewEncoder(w).Encode(answer)
		})
	}
	api("POST /demo/cgi-bin/stable_token", d.stableToken)
	api("GET /demo/cgi-bin/token", d.plainToken)
	api("POST /demo/cgi-bin/qrcode/create", d.createQR)
	api("GET /demo/sns/oauth2/access_token", d.exchangeCode)
	api("GET /demo/sns/userinfo", d.userInfo)
	d.HandleFunc("GET /demo/cgi-bin/showqrcode", d.showQR)
	d.HandleFunc("/demo/q/{id}", d.phone)
	d.HandleFunc("/demo/connect/oauth2/authorize", d.phone)
	d.HandleFunc("GET /demo/qr/code", d.showAccount)
	d.HandleFunc("/demo/chat", d.phone)
	d.HandleFunc("POST /demo/scan", d.scan)
	return d
}

// issue grants something for a time, and returns its name.
func (d *demo) issue(name string, life time.Duration, g grant) string {
	d.mu.Lock()
	defer d.mu.Unlock()
	if len(d.grants) >= maxGrants {
		const kept = 10 * time.Minute // while expired is not the same as unknown
		maps.DeleteFunc(d.grants, func(_ string, g grant) bool { return time.Since(g.expires) > kept })
	}
	if len(d.grants) >= maxGrants { // then an arbitrary tenth goes
		maps.DeleteFunc(d.grants, func(string, grant) bool { return len(d.grants) > maxGrants*9/10 })
	}
	g.expires = time.Now().Add(life)
	d.grants[name] = g
	return name
}

// granted returns a grant, which may have expired. If there is none, its kind is "".
func (d *demo) granted(name string) grant {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.grants[name]
}

func refuse(code int, message string) object {
	return object{"errcode": code, "errmsg": message + " rid: 674a2f31-0c81d5b4-3e9d17a6"}
}

func (d *demo) newToken() string {
	return d.issue("85_"+rand.Text()+strings.Repeat("-"+rand.Text(), 5), 2*time.Hour, grant{kind: "token"})
}

// stableToken gives the same token until 5 minutes before its end.
func (d *demo) stableToken(call apiCall) object {
	if call.isMalformed || call.GrantType != "client_credential" {
		return refuse(47001, "data format error")
	}
	if refused := d.stranger(call.AppID, call.Secret); refused != nil {
		return refused
	}
	if time.Until(d.granted(d.stable).expires) < 5*time.Minute {
		d.stable = d.newToken()
	}
	return object{"access_token": d.stable, "expires_in": int(time.Until(d.granted(d.stable).expires).Seconds())}
}

// plainToken gives a new token, and the former one 5 minutes to live.
func (d *demo) plainToken(call apiCall) object {
	if refused := d.stranger(call.Get("appid"), call.Get("secret")); refused != nil {
		return refused
	}
	if former := d.granted(d.plain); time.Until(former.expires) > 5*time.Minute {
		d.issue(d.plain, 5*time.Minute, former)
	}
	d.plain = d.newToken()
	return object{"access_token": d.plain, "expires_in": 7200}
}

// stranger refuses an appid or a secret that are not those of the account.
func (d *demo) stranger(appID, secret string) object {
	switch {
	case appID != d.config.appID:
		return refuse(40013, "invalid appid")
	case secret != d.config.appSecret:
		return refuse(40125, "invalid appsecret")
	}
	return nil
}

func (d *demo) createQR(call apiCall) object {
	token, scene := d.granted(call.Get("access_token")), call.ActionInfo.Scene.SceneStr
	switch {
	case token.kind != "token":
		return refuse(40001, "invalid credential, access_token is invalid or not latest")
	case time.Now().After(token.expires):
		return refuse(42001, "access_token expired")
	case call.isMalformed:
		return refuse(47001, "data format error")
	case call.ActionName != "QR_STR_SCENE", scene == "", len([]rune(scene)) > 64,
		call.ExpireSeconds < 1, call.ExpireSeconds > 2592000:
		return refuse(40097, "invalid args")
	}
	id, life := rand.Text(), time.Duration(call.ExpireSeconds)*time.Second
	link := d.config.publicURL + "/demo/q/" + id
	ticket := wechatTicket(link, time.Now(), life)
	d.issue(id, life, grant{kind: "qr", of: ticket, scope: scene})
	d.issue(ticket, life, grant{kind: "ticket", of: link})
	return object{"ticket": ticket, "expire_seconds": call.ExpireSeconds, "url": link}
}

// wechatTicket returns a ticket as WeChat makes it, of the QR code's text (254 bytes
// at most), the time and the life: no secret, as whoever sees the code can make it.
func wechatTicket(link string, made time.Time, life time.Duration) string {
	body := append([]byte{1, byte(len(link) + 1)}, link...)
	body = append(body, 0, 2, 4)
	body = binary.LittleEndian.AppendUint32(body, uint32(made.Unix()))
	body = append(body, 3, 4)
	body = binary.LittleEndian.AppendUint32(body, uint32(made.Add(life).Unix()))
	sum := int16(0)
	for _, b := range body {
		sum += int16(int8(b))
	}
	ticket := binary.LittleEndian.AppendUint16([]byte{0x81, 1}, uint16(^sum))
	ticket = binary.LittleEndian.AppendUint64(ticket, uint64(len(body)))
	return base64.URLEncoding.EncodeToString(append(ticket, body...))
}

func (d *demo) exchangeCode(call apiCall) object {
	if refused := d.stranger(call.Get("appid"), call.Get("secret")); refused != nil {
		return refused
	}
	code := d.granted(call.Get("code"))
	switch {
	case code.kind == "used":
		return refuse(40163, "code been used")
	case code.kind != "code":
		return refuse(40029, "invalid code")
	case time.Now().After(code.expires):
		return refuse(42003, "oauth_code expired")
	}
	d.issue(call.Get("code"), 0, grant{kind: "used"})
	token := d.issue(rand.Text(), 2*time.Hour, grant{kind: "user", of: code.of, scope: code.scope})
	answer := object{"access_token": token, "expires_in": 7200, "refresh_token": rand.Text(),
		"openid": code.of, "scope": code.scope}
	if code.virtual {
		answer["is_snapshotuser"] = 1
	}
	return answer
}

func (d *demo) userInfo(call apiCall) object {
	user := d.granted(call.Get("access_token"))
	switch {
	case user.kind != "user", time.Now().After(user.expires):
		return refuse(40001, "invalid credential")
	case user.of != call.Get("openid"):
		return refuse(40003, "invalid openid")
	case user.scope != "snsapi_userinfo":
		return refuse(48001, "api unauthorized")
	}
	return object{"openid": user.of, "nickname": user.of, "sex": 0, "province": "", "city": "", "country": "",
		"privilege": []string{}, "unionid": "union-" + user.of,
		"headimgurl": d.config.publicURL + "/static/demo/avatar.svg"}
}

func (d *demo) showQR(w http.ResponseWriter, r *http.Request) {
	ticket := d.granted(r.FormValue("ticket"))
	picture, err := qrPNG(ticket.of)
	if ticket.kind != "ticket" || err != nil {
		http.NotFound(w, r)
		return
	}
	write(w, http.StatusOK, "image/png", picture) // with WeChat, a JPEG
}
